"""Histories of latents, as the cache's codecs write them, and how far a prefill over one may be
from its definition."""

from dataclasses import dataclass, replace

import torch
from kvcluster_kernels import latent_plain, packed_plain, prefill_reference
from kvcluster_kernels.float8_decode import Float8Pages
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.latent_history import LatentHistory
from kvcluster_kernels.latent_pages import KeyExpansion, LatentPages
from kvcluster_kernels.latent_values import ValuePages
from kvcluster_kernels.packed_history import prefill_restored
from kvcluster_kernels.paging import Attention, PagedRows, Partial
from kvcluster_kernels.prefill_arguments import Keys
from kvcluster_kernels.rotated_decode import RotatedPages
from torch import Tensor

from kvcluster.attention import latent_cache
from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.float8 import Float8
from kvcluster.codec.latent import LatentKeys, LatentStorage, LatentValues
from kvcluster.codec.quantized import TokenQuantizer
from kvcluster.codec.rotated import Rotated, rotate
from tests.kernels.decode_cases import Batch, Bounds, assert_within, draw_rows
from tests.kernels.latent_cases import HALF_SPLIT, draw_basis, drawn_latents, expansion_of, rotary
from tests.kernels.packed_cases import draw_packed

SCALE = 0.1
VALUES = ("int4", "fp8", "latent", "latent in 4 bits", "exact", "rotated3")


@dataclass(frozen=True, kw_only=True)
class LatentCase:
    """One call."""

    bits: int | None = None
    rank: int = 64
    rotation: str = HALF_SPLIT
    values: str = "int4"
    group: int = 64
    scale_bits: int = 16
    is_rotated: bool = False
    """Latents, in sections that are powers of two."""
    num_tokens: int = 5
    num_keys: int = 190
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 64
    block_tokens: int = 64
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        named = {k: v for k, v in vars(self).items() if v != getattr(type(self), k, None)}
        return " ".join(f"{k}={v}" for k, v in named.items()) or "default"


_LONG = LatentCase(
    num_tokens=300, num_keys=2_003, num_heads=8, dim=128, rank=256, dtype=torch.bfloat16
)
GPU_CASES = (
    *(replace(_LONG, bits=bits) for bits in (None, 8, 4)),
    *(replace(_LONG, values=values, rank=100) for values in VALUES),
    replace(_LONG, dim=96, rank=96, rotation="partial", bits=4),
    replace(_LONG, num_kv_heads=4, rank=512, bits=4, scale_bits=8),
    replace(_LONG, rank=200, bits=4, is_rotated=True, values="rotated3"),
)


def check(case: LatentCase, device: torch.device, *, workspace_bytes: int = 1 << 30) -> None:
    """The call beside attention in float64 over the keys and values of the definition."""
    q_THD, history, rows = latent_arguments(case, device)

    found = prefill_restored(q_THD, history, scale=SCALE, workspace_bytes=workspace_bytes)

    k_KSD, v_KSD = definition(history, rows)
    right = prefill_reference.prefill(q_THD.double(), Keys.in_line(k_KSD, v_KSD), scale=SCALE)
    # Latents and the way back are rounded to float16, keys and queries to their own type.
    rounded = torch.float16 if case.dtype == torch.float32 else case.dtype
    bounds = Bounds(q_THD, 3 * k_KSD.abs(), Attention(SCALE), weights=rounded, operands=rounded)
    assert_within(
        Partial(found.out_THD[None], found.lse_TH[None]),
        Partial(right.out_THD[None], right.lse_TH[None]),
        (2 * v_KSD.abs().amax()).expand(found.out_THD[None].shape),
        bounds,
    )


def definition(history: LatentHistory, rows: PagedRows) -> tuple[Tensor, Tensor]:
    """k_KSD and v_KSD, float64."""
    k_KSD = latent_plain.restore_keys(history.keys, history.expansion, rows, torch.float64)[0]
    if history.value_expansion is not None:
        assert isinstance(history.values, LatentPages)
        v_KSD = latent_plain.restore_keys(
            history.values, history.value_expansion, rows, torch.float64
        )[0]
    elif isinstance(history.values, Float8Pages):
        v_RBKDS = packed_plain.restore_float8(history.values, rows.blocks_RB, torch.float64)
        v_KSD = packed_plain.in_line(v_RBKDS.transpose(3, 4))[0]
    else:
        v_KSD = latent_plain.restore_values(
            history.values, rows.blocks_RB, history.block_tokens, torch.float64
        )[0]
        if history.rotation_DD is not None:
            v_KSD = v_KSD @ history.rotation_DD.double()
    return k_KSD[:, : history.num_keys], v_KSD[:, : history.num_keys]


def latent_arguments(
    case: LatentCase, device: torch.device
) -> tuple[Tensor, LatentHistory, PagedRows]:
    """What lies in blocks that are not the sequence's is NaN, or the largest code."""
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        lengths=(case.num_keys,),
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        dim_k=case.dim,
        dim_v=case.dim,
        block_size=case.block_tokens,
        has_positions=True,
    )
    rows = draw_rows(batch, generator, device)
    basis = draw_basis(case.num_kv_heads, case.dim, case.rank, generator)
    turning = rotary(case.rotation, case.dim)
    storage = LatentStorage(case.bits, case.is_rotated, case.group, case.scale_bits)
    codec = LatentKeys(
        basis, num_heads=case.num_kv_heads, rank=case.rank, rotation=turning, storage=storage
    )
    keys = drawn_latents(codec, case.dim, batch, rows, 1)
    up_CF = latent_cache.stored_up(codec.stored, basis)
    expansion = expansion_of(basis, case.num_kv_heads, turning, device, up_CF)
    values, value_expansion = _values(case, batch, rows, device)
    q_shape = (case.num_tokens, case.num_heads, case.dim)
    q_THD = torch.randn(q_shape, generator=generator).to(case.dtype).to(device)
    assert rows.block_positions_RB is not None
    history = LatentHistory(
        keys,
        expansion,
        values,
        value_expansion,
        rows.blocks_RB[0],
        rows.block_positions_RB[0],
        case.num_keys,
        case.dim,
        case.dim,
        rotate(torch.eye(case.dim, device=device)).T if case.values == "rotated3" else None,
    )
    return q_THD, history, rows


def _values(
    case: LatentCase, batch: Batch, rows: PagedRows, device: torch.device
) -> tuple[ValuePages | Float8Pages, KeyExpansion | None]:
    generator = torch.Generator().manual_seed(2)

    def drawn(codec: ArrayCodec) -> list[Tensor]:
        return list(draw_packed(codec, case.dim, batch, rows, generator))

    if case.values == "int4":
        return IntegerPages(*drawn(TokenQuantizer(4, group=32))), None
    if case.values == "fp8":
        return Float8Pages(*drawn(Float8(transposed=True))), None
    if case.values == "rotated3":
        codes, high, scale = drawn(Rotated(3, transposed=True))
        return RotatedPages(codes, scale, high=high), None
    if case.values == "exact":
        return LatentPages(drawn(ExactArray(torch.bfloat16))[0]), None
    bits = 4 if case.values == "latent in 4 bits" else None
    basis = draw_basis(case.num_kv_heads, case.dim, case.rank, generator)
    codec = LatentValues(
        basis, num_heads=case.num_kv_heads, rank=case.rank, storage=LatentStorage(bits=bits)
    )
    return drawn_latents(codec, case.dim, batch, rows, 3), expansion_of(
        basis, case.num_kv_heads, None, device
    )
