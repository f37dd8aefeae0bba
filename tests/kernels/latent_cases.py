"""Bases, rotations and paged latents for tests of latent kernels, written by the cache's codecs."""

from collections.abc import Callable
from dataclasses import replace

import torch
from kvcluster_kernels import latent_plain
from kvcluster_kernels.decode_plain import attend_tokens
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.latent_decode import decode_latents
from kvcluster_kernels.latent_pages import (
    KeyExpansion,
    KeyRotation,
    LatentPages,
    Latents,
    key_expansion,
)
from kvcluster_kernels.latent_values import ValuePages
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from kvcluster_kernels.rotated_decode import RotatedPages
from torch import Tensor

from kvcluster.attention import latent_cache
from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.basis import Basis
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.filling import Grade
from kvcluster.codec.latent import LatentKeys, LatentStorage, LatentValues
from kvcluster.codec.quantized import TokenQuantizer
from kvcluster.codec.rotated import Rotated
from kvcluster.model.rotary import Pairing, Rotary
from tests.kernels.decode_cases import RAGGED, Batch, Bounds, assert_within, draw_queries, draw_rows
from tests.kernels.packed_cases import draw_packed

BLOCKS = replace(RAGGED, lengths=(110, 0, 1, 123), block_size=64, has_positions=True)
ATTENTION = Attention(scale=0.1)
HALF_SPLIT = "half split"
NUMBERS = LatentStorage()
ROTATIONS = (HALF_SPLIT, "interleaved", "partial", "none")


STORAGES = {
    "4 bits": LatentStorage(4),
    "4 bits in groups of 16, scale_bits=8": LatentStorage(4, group=16, scale_bits=8),
    "8 bits in groups of 32": LatentStorage(8, group=32),
    "3 bits": LatentStorage(3),
    "2 bits, scale_bits=8": LatentStorage(2, scale_bits=8),
    "rotated 4 bits": LatentStorage(4, is_rotated=True),
    "rotated 3 bits": LatentStorage(3, is_rotated=True),
}
"""How latents are written, besides as `NUMBERS` of 16 bits."""


def draw_basis(num_heads: int, dim: int, rank: int, generator: torch.Generator) -> Basis:
    """Orthogonal directions, so that a latent of a drawn block is of order 1."""
    width = num_heads * dim
    directions_FF, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return Basis(
        mean_F=torch.randn(width, generator=generator),
        down_FC=directions_FF[:, :rank].contiguous(),
        up_CF=directions_FF[:, :rank].T.contiguous(),
        spectrum_F=torch.ones(width, dtype=torch.float64),
    )


def rotary(name: str, dim: int) -> Rotary | None:
    """A rotation of keys, as a model's layer may have it."""
    if name == "none":
        return None
    num_turned = dim // 4 if name == "partial" else dim // 2
    return Rotary(
        inverse_frequencies_F=10_000.0 ** -(torch.arange(num_turned) / num_turned),
        scaling=1.2 if name == "partial" else 1.0,
        first_dim=8 if name == "partial" else 0,
        pairing=Pairing.INTERLEAVED if name == "interleaved" else Pairing.HALF_SPLIT,
    )


def kernel_rotation(rotation: Rotary | None) -> KeyRotation | None:
    if rotation is None:
        return None
    return KeyRotation(
        rotation.inverse_frequencies_F,
        rotation.scaling,
        rotation.first_dim,
        rotation.pairing is Pairing.INTERLEAVED,
    )


def expansion_of(
    basis: Basis,
    num_heads: int,
    rotation: Rotary | None,
    device: torch.device,
    up_CF: Tensor | None = None,
) -> KeyExpansion:
    """`up_CF`: of latents that are stored in another basis."""
    made = key_expansion(
        basis.up_CF if up_CF is None else up_CF,
        basis.mean_F,
        num_kv_heads=num_heads,
        rotation=kernel_rotation(rotation),
    )
    return KeyExpansion(*(x.to(device) for x in made[:4]), made.dim)


def latent_pages(codec: ArrayCodec, batch: Batch, rows: PagedRows, seed: int) -> LatentPages:
    """Of numbers of 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    return LatentPages(draw_packed(codec, batch.dim_k, batch, rows, generator)[0])


def drawn_latents(
    codec: LatentKeys | LatentValues, dim: int, batch: Batch, rows: PagedRows, seed: int
) -> Latents:
    generator = torch.Generator().manual_seed(seed)
    planes = draw_packed(codec, dim, batch, rows, generator)
    pages = latent_cache.latent_pages(codec.stored, planes, codec.rank)
    assert pages is not None, "no kernel reads these"
    return pages


ValueDraw = Callable[[Batch, PagedRows], ValuePages]


def _exact(batch: Batch, rows: PagedRows) -> ValuePages:
    generator = torch.Generator().manual_seed(2)
    codec = ExactArray(torch.bfloat16)
    return LatentPages(draw_packed(codec, batch.dim_v, batch, rows, generator)[0])


def _latents(storage: LatentStorage, rank: int) -> ValueDraw:
    def draw(batch: Batch, rows: PagedRows) -> ValuePages:
        generator = torch.Generator().manual_seed(3)
        basis = draw_basis(batch.num_kv_heads, batch.dim_v, rank, generator)
        codec = LatentValues(basis, num_heads=batch.num_kv_heads, rank=rank, storage=storage)
        return drawn_latents(codec, batch.dim_v, batch, rows, 3)

    return draw


def _integers(bits: int, group: int, scale_bits: int) -> ValueDraw:
    def draw(batch: Batch, rows: PagedRows) -> ValuePages:
        generator = torch.Generator().manual_seed(4)
        codec = TokenQuantizer(bits, group=group, scale_bits=scale_bits)
        planes = draw_packed(codec, batch.dim_v, batch, rows, generator)
        high = planes.pop(1) if bits == 3 else None
        return IntegerPages(*planes)._replace(high=high)

    return draw


def _rotated(bits: int) -> ValueDraw:
    def draw(batch: Batch, rows: PagedRows) -> ValuePages:
        generator = torch.Generator().manual_seed(5)
        codec = Rotated(bits, transposed=True)
        planes = draw_packed(codec, batch.dim_v, batch, rows, generator)
        return RotatedPages(planes[0], planes[-1], high=planes[1] if bits == 3 else None)

    return draw


VALUES: dict[str, ValueDraw] = {
    "exact": _exact,
    "latent": _latents(NUMBERS, 64),
    "latent of an odd rank": _latents(NUMBERS, 44),
    "latent in 4 bits": _latents(LatentStorage(4), 64),
    "latent in 2 bits": _latents(LatentStorage(2), 64),
    "latent in rotated 4 bits": _latents(LatentStorage(4, is_rotated=True), 96),
    "filled latent": _latents(LatentStorage(grades=(Grade(8, 16), Grade(3, 32), Grade(2, 8))), 56),
    "int8": _integers(8, 64, 16),
    "int4": _integers(4, 64, 16),
    "int3": _integers(3, 32, 16),
    "int3 in groups of 64": _integers(3, 64, 16),
    "int4 scale_bits=8": _integers(4, 32, 8),
    "int2": _integers(2, 32, 16),
    "rotated4": _rotated(4),
    "rotated3": _rotated(3),
    "rotated2": _rotated(2),
}


LatentDecode = Callable[
    [Tensor, Latents, KeyExpansion, ValuePages, PagedRows, Attention, DecodeSettings | None],
    Partial,
]


def check(
    batch: Batch,
    device: torch.device,
    *,
    rank: int = 64,
    storage: LatentStorage = NUMBERS,
    rotation: str = HALF_SPLIT,
    values: str = "int4",
    attention: Attention = ATTENTION,
    settings: DecodeSettings | None = None,
    decode: LatentDecode = decode_latents,
) -> None:
    """The kernel beside its definition."""
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, device)
    q_RTHD = draw_queries(batch, generator, device)
    basis = draw_basis(batch.num_kv_heads, batch.dim_k, rank, generator)
    turning = rotary(rotation, batch.dim_k)
    codec = LatentKeys(
        basis, num_heads=batch.num_kv_heads, rank=rank, rotation=turning, storage=storage
    )
    k = drawn_latents(codec, batch.dim_k, batch, rows, 1)
    up_CF = latent_cache.stored_up(codec.stored, basis)
    expansion = expansion_of(basis, batch.num_kv_heads, turning, device, up_CF)
    v = VALUES[values](batch, rows)

    found = decode(q_RTHD, k, expansion, v, rows, attention, settings)

    want = latent_plain.decode_latents(q_RTHD.double(), k, expansion, v, rows, attention)
    k_RKSD = latent_plain.restore_keys(k, expansion, rows, torch.float64)
    v_RKSD = latent_plain.restore_values(v, rows.blocks_RB, batch.block_size, torch.float64)
    magnitude_RKSD = value_magnitude(v, v_RKSD).expand(-1, k_RKSD.shape[1], -1, -1)
    magnitude = attend_tokens(q_RTHD.double(), k_RKSD, magnitude_RKSD, rows, attention)
    assert_within(found, want, magnitude.out_RTHD, bounds(q_RTHD, k_RKSD, attention))


def bounds(q_RTHD: Tensor, k_RKSD: Tensor, attention: Attention) -> Bounds:
    """Latents are rounded to float16 before they meet `up`, the keys that they become once more,
    and so are queries, turned: three roundings, where `operands` counts one of both sides."""
    return Bounds(q_RTHD, 3 * k_RKSD, attention, weights=torch.float16, operands=torch.float16)


def value_magnitude(pages: ValuePages, v_RKSD: Tensor) -> Tensor:
    """What the rounding of values is relative to: of codes, the largest of a token, whose scale and
    zero-point are rounded beside weights."""
    if isinstance(pages, LatentPages) and pages.scale is None:
        return v_RKSD.abs()
    return v_RKSD.abs().amax(dim=-1, keepdim=True).expand_as(v_RKSD)
