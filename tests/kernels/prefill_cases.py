"""Cases of prefill attention, and how far a kernel may be from the exact result.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension.
"""

import math
from dataclasses import dataclass, replace

import torch
from kvcluster_kernels import prefill_reference
from kvcluster_kernels.prefill_arguments import BlockBound, Causal, Keys, PartialAttention
from torch import Tensor

_PAGE_BLOCKS = 4
_MAX_LOGITS = 1 << 24
"""That the definition has at a time: 128 MiB, several times."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a prefill kernel."""

    name: str
    num_tokens: int = 37
    num_keys: int = 75
    num_heads: int = 6
    num_kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    dtype: torch.dtype = torch.float32
    block_tokens: int | None = None
    """Keys of a block of a paged cache; None: they lie in line."""
    causal: Causal | None = None
    softcap: float | None = None
    has_sinks: bool = False
    is_carried: bool = False
    num_splits: int | None = None

    def scaled(self, factor: int) -> "Case":
        """The same with `factor` times as many tokens and keys, and rules that fit."""
        causal = self.causal
        if causal is not None:
            causal = Causal(
                causal.start * factor,
                None if causal.split is None else causal.split * factor,
                causal.resume * factor,
                None if causal.window is None else causal.window * factor,
                causal.bound,
            )
        return replace(
            self,
            num_tokens=self.num_tokens * factor,
            num_keys=self.num_keys * factor,
            causal=causal,
        )


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Random tensors of a case."""

    q_THD: Tensor
    keys: Keys
    scale: float
    causal: Causal | None
    softcap: float | None
    sinks_H: Tensor | None
    carry: PartialAttention | None

    def rules(self) -> dict[str, object]:
        """The arguments after queries and keys."""
        return {
            "scale": self.scale,
            "causal": self.causal,
            "softcap": self.softcap,
            "sinks_H": self.sinks_H,
            "carry": self.carry,
        }


DIMS = (
    Case(name="head 64", key_dim=64, value_dim=64),
    Case(name="head 96", key_dim=96, value_dim=96),
    Case(name="head 128", key_dim=128, value_dim=128),
    Case(name="head 256", key_dim=256, value_dim=256, num_heads=2),
    Case(name="narrow values", key_dim=96, value_dim=64),
    Case(name="narrow keys", key_dim=32, value_dim=128),
)
RULES = (
    Case(name="causal", num_tokens=75, causal=Causal()),
    Case(name="chunk after history", causal=Causal(start=38)),
    Case(name="zigzag", causal=Causal(start=3, split=18, resume=56)),
    Case(name="window", num_tokens=75, causal=Causal(window=20)),
    Case(name="window before the rows", causal=Causal(start=80, window=40)),
    Case(
        name="before a block", num_tokens=75, causal=Causal(bound=BlockBound(16, 1, is_before=True))
    ),
    Case(
        name="from a block on",
        num_tokens=75,
        causal=Causal(bound=BlockBound(16, 1, is_before=False)),
    ),
    Case(
        name="zigzag before a block",
        causal=Causal(start=3, split=18, resume=56, bound=BlockBound(8, 2, is_before=True)),
    ),
    Case(
        name="window from a block on",
        num_tokens=75,
        causal=Causal(window=20, bound=BlockBound(16, 0, is_before=False)),
    ),
    Case(name="rows before all keys", causal=Causal(start=-20)),
    Case(name="softcap", softcap=5.0),
    Case(name="sinks", has_sinks=True),
    Case(name="carry", is_carried=True),
    Case(name="carry of wide heads", is_carried=True, key_dim=192, value_dim=192, num_heads=2),
    Case(name="all rules", causal=Causal(5, 17, 40, 20), softcap=3.0, has_sinks=True),
)
LAYOUTS = (
    Case(name="blocks of 16", block_tokens=16),
    Case(name="blocks of 64", block_tokens=64),
    Case(name="blocks and causal", block_tokens=16, causal=Causal(start=38)),
    Case(name="one head", num_heads=1, num_kv_heads=1),
    Case(name="one token", num_tokens=1, num_heads=8),
    Case(name="one key", num_keys=1),
    Case(name="splits", num_splits=3, num_keys=150, is_carried=True, has_sinks=True),
    Case(name="more splits than keys", num_splits=7),
    Case(name="no token", num_tokens=0),
    Case(name="no key", num_keys=0),
    Case(name="no key but a carry", num_keys=0, is_carried=True),
)


def arguments(case: Case, device: torch.device) -> Arguments:
    """Random arguments; what lies beside the keys, and in unused blocks, is NaN."""
    torch.manual_seed(0)
    heads, tokens, groups = case.num_heads, case.num_tokens, case.num_kv_heads
    carry = sinks_H = None
    if case.is_carried:
        carry = PartialAttention(
            torch.randn(tokens, heads, case.value_dim, device=device),
            torch.randn(tokens, heads, device=device),
        )
        # Rows that had seen nothing yet.
        carry.out_THD[::5] = 0.0
        carry.lse_TH[::5] = -math.inf
    if case.has_sinks:
        sinks_H = torch.randn(heads, device=device)
    k_KSD, v_KSD = (
        torch.randn(groups, case.num_keys, dim, device=device).to(case.dtype)
        for dim in (case.key_dim, case.value_dim)
    )
    return Arguments(
        q_THD=torch.randn(tokens, heads, case.key_dim, device=device).to(case.dtype),
        keys=_poisoned(k_KSD, v_KSD, case.block_tokens),
        scale=case.key_dim**-0.5,
        causal=case.causal,
        softcap=case.softcap,
        sinks_H=sinks_H,
        carry=carry,
    )


def _poisoned(k_KSD: Tensor, v_KSD: Tensor, block_tokens: int | None) -> Keys:
    num_keys = k_KSD.shape[1]
    if block_tokens is None:
        planes = []
        for x_KSD in (k_KSD, v_KSD):
            room_KSD = x_KSD.new_full((len(x_KSD), num_keys + 16, x_KSD.shape[2]), math.nan)
            room_KSD[:, 8 : 8 + num_keys] = x_KSD
            planes.append(room_KSD[:, 8 : 8 + num_keys])
        return Keys.in_line(*planes)
    num_blocks = -(-num_keys // block_tokens)
    num_pages = num_blocks // _PAGE_BLOCKS + 2
    ids_N = torch.randperm(num_pages * _PAGE_BLOCKS)[:num_blocks]
    pages = []
    for x_KSD in (k_KSD, v_KSD):
        shape = (num_pages, len(x_KSD), _PAGE_BLOCKS * block_tokens, x_KSD.shape[2])
        pages_PKSD = x_KSD.new_full(shape, math.nan)
        for block, start in zip(ids_N.tolist(), range(0, num_keys, block_tokens), strict=True):
            part_KSD = x_KSD[:, start : start + block_tokens]
            slot = block % _PAGE_BLOCKS * block_tokens
            pages_PKSD[block // _PAGE_BLOCKS, :, slot : slot + part_KSD.shape[1]] = part_KSD
        pages.append(pages_PKSD)
    return Keys(*pages, num_keys, ids_N.to(torch.int32).to(k_KSD.device), block_tokens)


def exact(given: Arguments) -> PartialAttention:
    """The result in float64, of the same rounded numbers; some rows at a time, because of the
    room that their logits take."""
    num_tokens, num_heads, _ = given.q_THD.shape
    keys = given.keys
    keys = keys._replace(k_PKSD=keys.k_PKSD.double(), v_PKSD=keys.v_PKSD.double())
    num_rows = max(1, _MAX_LOGITS // max(1, num_heads * keys.num_keys))
    pieces = [
        prefill_reference.prefill(
            given.q_THD[first : first + num_rows].double(),
            keys,
            scale=given.scale,
            causal=given.causal and _causal_from(given.causal, first),
            softcap=given.softcap,
            sinks_H=given.sinks_H,
            carry=given.carry
            and PartialAttention(*(x[first : first + num_rows].double() for x in given.carry)),
        )
        for first in range(0, max(1, num_tokens), num_rows)
    ]
    return PartialAttention(*map(torch.cat, zip(*pieces, strict=True)))


def _causal_from(causal: Causal, first: int) -> Causal:
    """The rule of rows from `first` on, counted from there."""
    start = causal.start + first
    if causal.split is None:
        return causal._replace(start=start)
    split = max(0, causal.split - first)
    resume = causal.resume + first - causal.split + split
    return Causal(start, split, resume, causal.window, causal.bound)


def assert_within_rounding(
    found: PartialAttention, given: Arguments, *, weight_unit: float = 0.0
) -> None:
    """The result is the exact one but for float32 arithmetic, and weights that are rounded by
    `weight_unit`, relative, before they are multiplied with values.

    A logit is off by at most (D + 2) u |q| |k| scale (a sum of D products, whatever its order), a
    softcap adds its own unit twice; tanh does not stretch. Weights are then off by twice that much
    relative, and by their rounding; sums of S weights and products by another S u.
    """
    right = exact(given)
    assert torch.equal(found.lse_TH.isfinite(), right.lse_TH.isfinite())
    assert not found.out_THD.isnan().any()
    blind_TH = right.lse_TH == -math.inf
    assert (found.out_THD[blind_TH] == 0).all()
    unit = torch.finfo(torch.float32).eps
    k_KSD, v_KSD = (x_KSD.double() for x_KSD in prefill_reference.keys_in_line(given.keys))
    num_keys = max(1, k_KSD.shape[1])
    group = given.q_THD.shape[1] // len(k_KSD)
    longest_K = k_KSD.norm(dim=-1).amax(dim=1) if k_KSD.shape[1] else k_KSD.new_zeros(len(k_KSD))
    largest_K = v_KSD.abs().amax(dim=(1, 2)) if v_KSD.shape[1] else v_KSD.new_zeros(len(v_KSD))
    size_TH = given.q_THD.double().norm(dim=-1) * longest_K.repeat_interleave(group) * given.scale
    logit_TH = (given.q_THD.shape[2] + 2) * unit * size_TH
    if given.softcap is not None:
        logit_TH = logit_TH + 4 * unit * given.softcap
    # The exponent itself is rounded, where it is as large as the logits.
    logit_TH = logit_TH + 4 * unit * (size_TH + 1)
    weight_TH = 2 * logit_TH + weight_unit + 2 * num_keys * unit
    largest_TH = largest_K.repeat_interleave(group).expand_as(size_TH)
    if given.carry is not None:
        largest_TH = torch.maximum(largest_TH, given.carry.out_THD.double().abs().amax(-1))
    out_TH = (found.out_THD.double() - right.out_THD).abs().amax(-1)
    assert (out_TH <= weight_TH * largest_TH).all()
    lse_TH = (found.lse_TH.double() - right.lse_TH).abs()[~blind_TH]
    scale_TH = right.lse_TH.abs()[~blind_TH]
    assert (lse_TH <= (logit_TH + 2 * num_keys * unit)[~blind_TH] + 4 * unit * scale_TH).all()
