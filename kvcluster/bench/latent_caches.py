"""Paged caches of latent keys with random contents, for benchmarks of decode kernels."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple

import torch
from kvcluster_kernels.absorbed_decode import decode_absorbed
from kvcluster_kernels.decode import ExactPages
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.latent_decode import decode_latents
from kvcluster_kernels.latent_pages import (
    KeyExpansion,
    KeyRotation,
    LatentPages,
    key_expansion,
)
from kvcluster_kernels.latent_values import ValuePages
from kvcluster_kernels.paging import Attention, PagedRows
from kvcluster_kernels.rotated_decode import RotatedPages
from torch import Tensor

from kvcluster.bench.decode_caches import BLOCK_SIZE, Cache, DecodeShape
from kvcluster.types import PAGE_BLOCKS

_ROPE_BASE: Final = 500_000.0
MLA_ROTARY_DIM: Final = 64
"""Of a key of multi-head latent attention."""


class LatentFormat(NamedTuple):
    """How keys and values of a token are stored."""

    share: float
    """Rank of the keys over the numbers that a token has."""
    bits: int
    """Of a latent of keys: 16 or 4."""
    values: str
    """One of `_VALUES`."""

    def __str__(self) -> str:
        return f"latent r={self.share:g} bits={self.bits} values={self.values}"

    def rank(self, shape: DecodeShape) -> int:
        return round(self.share * shape.num_kv_heads * shape.dim)


def latent_cache(form: LatentFormat, shape: DecodeShape, q_RTHD: Tensor) -> Cache:
    """Blocks of one row in any order; positions in line. Of latent values, the way back of the sum
    is not part of the call: it is one small product a layer, whatever the length."""
    device = q_RTHD.device
    keys, expansion, values = latent_planes(form, shape, device)
    attention = Attention(scale=shape.dim**-0.5)
    run = partial(
        decode_latents, q_RTHD, keys, expansion, values, rows_in_line(shape, device), attention
    )
    planes = [plane for plane in (*keys, *values) if plane is not None]
    return Cache(run, sum(plane.nbytes for plane in planes))


def latent_planes(
    form: LatentFormat, shape: DecodeShape, device: torch.device
) -> tuple[LatentPages, KeyExpansion, ValuePages]:
    """Keys, the way back to them, and values."""
    rank, width = form.rank(shape), shape.num_kv_heads * shape.dim
    expansion = key_expansion(
        torch.randn(rank, width, device=device) * rank**-0.5,
        torch.randn(width, device=device),
        num_kv_heads=shape.num_kv_heads,
        rotation=KeyRotation(rotary_frequencies(shape.dim, device)),
    )
    keys = latent_pages(shape, device, rank, form.bits)
    return keys, expansion, _VALUES[form.values](shape, device)


def absorbed_cache(shape: DecodeShape, q_RTHD: Tensor) -> Cache:
    """Multi-head latent attention: one KV head, whose values are all but its last numbers."""
    num_pages = -(-shape.num_blocks // PAGE_BLOCKS)
    size = (num_pages, 1, PAGE_BLOCKS * BLOCK_SIZE, shape.dim)
    k_PKND = torch.randn(size, dtype=torch.float16, device=q_RTHD.device).to(q_RTHD.dtype)
    pages = ExactPages(k_PKND, k_PKND[..., : shape.dim - MLA_ROTARY_DIM], BLOCK_SIZE)
    rows = rows_in_line(shape, q_RTHD.device)._replace(block_positions_RB=None, q_positions_RT=None)
    run = partial(decode_absorbed, q_RTHD, pages, rows, Attention(scale=shape.dim**-0.5))
    return Cache(run, k_PKND.nbytes)


def rotary_frequencies(dim: int, device: torch.device) -> Tensor:
    """Radians per position of every pair of a head."""
    return _ROPE_BASE ** -(torch.arange(dim // 2, device=device) / (dim // 2))


def rows_in_line(shape: DecodeShape, device: torch.device) -> PagedRows:
    """All keys of one row, in blocks in any order, and the last positions for its queries."""

    def int32(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    starts_1B = torch.arange(shape.num_blocks, dtype=torch.int32, device=device)[None] * BLOCK_SIZE
    last = range(shape.num_keys - shape.num_tokens, shape.num_keys)
    return PagedRows(
        torch.randperm(shape.num_blocks, dtype=torch.int32, device=device)[None],
        int32(0),
        int32(shape.num_keys),
        starts_1B,
        int32(*last)[None],
    )


def latent_pages(shape: DecodeShape, device: torch.device, rank: int, bits: int) -> LatentPages:
    """Of one head of so many numbers."""
    blocks = _blocks(shape, 1)
    if bits == 16:
        return LatentPages(_halves(device, *blocks, BLOCK_SIZE, rank))
    codes = _bytes(device, *blocks, BLOCK_SIZE, rank * bits // 8)
    scale = torch.rand((*blocks, 1, rank), dtype=torch.float16, device=device) * (4 / 2**bits)
    return LatentPages(codes, scale, scale * -(2.0 ** (bits - 1)))


def _blocks(shape: DecodeShape, num_heads: int) -> tuple[int, int, int]:
    return (-(-shape.num_blocks // PAGE_BLOCKS), PAGE_BLOCKS, num_heads)


def _halves(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float16, device=device)


def _bytes(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def _exact(shape: DecodeShape, device: torch.device) -> ValuePages:
    return LatentPages(
        _halves(device, *_blocks(shape, shape.num_kv_heads), BLOCK_SIZE, shape.dim).bfloat16()
    )


def _integers(bits: int, group: int, shape: DecodeShape, device: torch.device) -> ValuePages:
    blocks = _blocks(shape, shape.num_kv_heads)
    codes = _bytes(device, *blocks, shape.dim, BLOCK_SIZE * bits // 8)
    grid = (*blocks, max(1, shape.dim // group), BLOCK_SIZE)
    scale = torch.rand(grid, dtype=torch.float16, device=device) * (4 / 2**bits)
    stored = codes.view(torch.int8) if bits == 8 else codes
    return IntegerPages(stored, scale, scale * -(2.0 ** (bits - 1)))


def _rotated(bits: int, shape: DecodeShape, device: torch.device) -> ValuePages:
    blocks = _blocks(shape, shape.num_kv_heads)
    low = 2 if bits == 3 else bits
    codes = _bytes(device, *blocks, shape.dim, BLOCK_SIZE * low // 8)
    high = _bytes(device, *blocks, shape.dim, BLOCK_SIZE // 8) if bits == 3 else None
    return RotatedPages(codes, torch.rand((*blocks, BLOCK_SIZE), device=device).half(), high=high)


def _latents(share: float, bits: int, shape: DecodeShape, device: torch.device) -> ValuePages:
    rank = round(share * shape.num_kv_heads * shape.dim)
    return latent_pages(shape, device, rank, bits)


_VALUES: Final[Mapping[str, Callable[[DecodeShape, torch.device], ValuePages]]] = {
    "bf16": _exact,
    "int8": partial(_integers, 8, 64),
    "int4": partial(_integers, 4, 64),
    "int2": partial(_integers, 2, 32),
    "rotated4": partial(_rotated, 4),
    "rotated3": partial(_rotated, 3),
    "rotated2": partial(_rotated, 2),
    "latent": partial(_latents, 0.25, 16),
    "latent4": partial(_latents, 0.25, 4),
}

FORMATS: Final = (
    LatentFormat(0.25, 4, "int4"),
    LatentFormat(0.25, 4, "rotated3"),
    LatentFormat(0.375, 4, "rotated3"),
    LatentFormat(0.25, 4, "rotated4"),
    LatentFormat(0.25, 16, "int4"),
    LatentFormat(0.25, 16, "bf16"),
    LatentFormat(0.25, 16, "latent"),
    LatentFormat(0.25, 4, "latent4"),
    LatentFormat(0.125, 4, "int4"),
    LatentFormat(0.125, 4, "int2"),
    LatentFormat(0.5, 4, "int4"),
)
"""What is timed: the recipe of low-rank keys and low-bit values first, then what it is between."""
