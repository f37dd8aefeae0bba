"""Histories in packed formats, as the cache's codecs write them, and how far a prefill over one may
be from its definition.

Shape letters: those of `kvcluster_kernels.packed_prefill`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from kvcluster_kernels import packed_prefill_reference
from kvcluster_kernels.float8_decode import Float8Pages
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.packed_prefill import History
from kvcluster_kernels.paging import Attention, Partial
from kvcluster_kernels.prefill_arguments import PartialAttention
from torch import Tensor

from kvcluster.codec.float8 import Float8
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from tests.kernels.decode_cases import Batch, Bounds, assert_within, draw_rows
from tests.kernels.packed_cases import draw_packed

SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class PackedCase:
    """One call."""

    bits: int
    """0: floats of 8 bits."""
    group: int = 64
    scale_bits: int = 16
    num_tokens: int = 5
    num_keys: int = 123
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 64
    value_dim: int = 64
    value_group: int = 64
    block_tokens: int = 64
    is_carried: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        named = {k: v for k, v in vars(self).items() if v != getattr(type(self), k, None)}
        return " ".join(f"{k}={v}" for k, v in named.items())


_LONG = PackedCase(
    bits=0, num_tokens=75, num_keys=2_003, num_heads=8, dim=128, value_dim=128, dtype=torch.bfloat16
)
GPU_CASES = (
    *(replace(_LONG, bits=bits) for bits in (0, 8, 4)),
    *(replace(_LONG, bits=bits, dim=64, value_dim=64, is_carried=True) for bits in (0, 8, 4)),
    *(replace(_LONG, bits=bits, dim=96, value_dim=96, value_group=32) for bits in (0, 8, 4)),
    *(replace(_LONG, bits=bits, group=32, value_group=32, scale_bits=8) for bits in (8, 4, 2)),
    replace(_LONG, bits=2, group=16, value_group=16),
    replace(_LONG, bits=4, num_tokens=3),
    replace(_LONG, bits=8, block_tokens=32, group=32, num_tokens=700, dtype=torch.float16),
)
"""With several tiles of rows and pieces of keys, the last one not full."""
RESTORED_CASES = (
    *GPU_CASES,
    *(replace(_LONG, bits=3, dim=dim, value_dim=dim, value_group=32) for dim in (128, 96)),
)


class PackedArguments(NamedTuple):
    """Random tensors of a case."""

    q_THD: Tensor
    history: History
    carry: PartialAttention | None


def packed_arguments(case: PackedCase, device: torch.device) -> PackedArguments:
    """What lies in blocks that are not the sequence's is NaN, or the largest code."""
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        lengths=(case.num_keys,),
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        block_size=case.block_tokens,
    )
    rows = draw_rows(batch, generator, device)
    if case.bits == 0:
        keys, values = (
            Float8Pages(*draw_packed(codec, dim, batch, rows, generator))
            for codec, dim in (
                (Float8(), case.dim),
                (Float8(transposed=True), case.value_dim),
            )
        )
    else:
        k_codec = ChannelQuantizer(case.bits, group=case.group, scale_bits=case.scale_bits)
        v_codec = TokenQuantizer(case.bits, group=case.value_group, scale_bits=case.scale_bits)
        keys, values = (
            _integer_pages(case.bits, draw_packed(codec, dim, batch, rows, generator))
            for codec, dim in ((k_codec, case.dim), (v_codec, case.value_dim))
        )
    q_shape = (case.num_tokens, case.num_heads, case.dim)
    q_THD = torch.randn(q_shape, generator=generator).to(case.dtype).to(device)
    carry = None
    if case.is_carried:
        out_shape = (case.num_tokens, case.num_heads, case.value_dim)
        carry = PartialAttention(
            torch.randn(out_shape, generator=generator).to(device),
            torch.randn(out_shape[:2], generator=generator).to(device),
        )
        # Rows that had seen nothing yet.
        carry.out_THD[::3] = 0.0
        carry.lse_TH[::3] = -torch.inf
    return PackedArguments(q_THD, History(keys, values, rows.blocks_RB[0], case.num_keys), carry)


def _integer_pages(bits: int, planes: list[Tensor]) -> IntegerPages:
    if bits != 3:
        return IntegerPages(*planes)
    codes, high, scale, zero, *unit = planes
    return IntegerPages(codes, scale, zero, unit[0] if unit else None, high)


def assert_close_to_definition(
    found: PartialAttention, given: PackedArguments, rounded: torch.dtype
) -> None:
    """Queries, restored numbers and weights are rounded to `rounded`, and numbers once more as the
    product of code and scale, which may be as much larger as zero-points are."""
    q_THD, history, carry = given
    right = packed_prefill_reference.prefill_packed(
        q_THD.double(),
        history,
        scale=SCALE,
        carry=carry and PartialAttention(*(x.double() for x in carry)),
    )
    keys = packed_prefill_reference.restored(history, q_THD.shape[2], torch.float64)
    k_KSD = keys.k_PKSD[0].abs() + 2 * _largest_zero(history.keys)
    v_KSD = keys.v_PKSD[0].abs() + 2 * _largest_zero(history.values)
    spread = v_KSD.amax() if carry is None else max(v_KSD.amax(), carry.out_THD.abs().amax())
    bounds = Bounds(q_THD, 2 * k_KSD, Attention(SCALE), weights=rounded, operands=rounded)
    assert_within(
        Partial(found.out_THD[None], found.lse_TH[None]),
        Partial(right.out_THD[None], right.lse_TH[None]),
        spread.expand(found.out_THD[None].shape),
        bounds,
    )


def _largest_zero(pages: IntegerPages | Float8Pages) -> float:
    if isinstance(pages, Float8Pages):
        return 0.0
    zero = pages.zero.float()
    if pages.unit is not None:
        scale = (pages.scale.to(torch.int16) << 5).view(torch.float16).float()
        zero = zero * scale * pages.unit[..., None, None]
    return float(zero[~zero.isnan()].abs().max())
