"""Paged caches of one layer with random contents, for benchmarks of decode kernels."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple

import torch
from kvcluster_kernels.decode import ExactPages, decode
from kvcluster_kernels.float8_decode import Float8Pages, decode_float8
from kvcluster_kernels.integer_decode import IntegerPages, decode_integers
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from kvcluster_kernels.rotated_decode import RotatedPages, decode_rotated
from torch import Tensor

from kvcluster.codec.rotated import rotate
from kvcluster.types import PAGE_BLOCKS

BLOCK_SIZE: Final = 64
_GROUP: Final = {8: 64, 4: 64, 3: 64, 2: 32}
"""Numbers that share a scale, as the policies of that name have them."""

Decode = Callable[[DecodeSettings | None], Partial]
"""One launch over all keys, with these settings or the kernel's own."""


class DecodeShape(NamedTuple):
    """One request's decode in one layer."""

    num_query_heads: int
    num_kv_heads: int
    dim: int
    num_keys: int
    num_tokens: int = 1

    def __str__(self) -> str:
        keys = self.num_keys >> 10
        length = f"{keys >> 10}M" if keys >= 1024 else f"{keys}K"
        heads = f"{self.num_query_heads}/{self.num_kv_heads}"
        return f"D{self.dim} {heads} q{self.num_tokens} {length}"

    @property
    def num_blocks(self) -> int:
        return self.num_keys // BLOCK_SIZE

    @property
    def exact_bytes(self) -> int:
        """Of K and V in bfloat16."""
        return 4 * self.num_keys * self.num_kv_heads * self.dim


class Cache(NamedTuple):
    """A cache that a kernel reads."""

    decode: Decode
    num_bytes: int
    """Of what is read: scales included."""


def queries(shape: DecodeShape, device: torch.device) -> Tensor:
    """q_RTHD of one row, bfloat16, on the device where its caches will be."""
    size = (1, shape.num_tokens, shape.num_query_heads, shape.dim)
    return torch.randn(size, dtype=torch.bfloat16, device=device)


def exact_cache(shape: DecodeShape, q_RTHD: Tensor) -> Cache:
    """Bfloat16 in pages as the cache has them, blocks in any order."""
    pages = exact_pages(shape, q_RTHD.device)
    run = partial(decode, q_RTHD, pages, *_asked(shape, q_RTHD.device))
    return Cache(run, shape.exact_bytes)


def exact_pages(shape: DecodeShape, device: torch.device) -> ExactPages:
    """Keys and values in bfloat16."""
    num_pages = -(-shape.num_blocks // PAGE_BLOCKS)
    size = (num_pages, shape.num_kv_heads, PAGE_BLOCKS * BLOCK_SIZE, shape.dim)
    k_PKND, v_PKND = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return ExactPages(k_PKND, v_PKND, BLOCK_SIZE)


def float8_cache(shape: DecodeShape, q_RTHD: Tensor) -> Cache:
    """e4m3 floats, values transposed."""
    keys, values = float8_pages(shape, q_RTHD.device)
    run = partial(decode_float8, q_RTHD, keys, values, *_asked(shape, q_RTHD.device))
    return Cache(run, _num_bytes(*keys, *values))


def float8_pages(shape: DecodeShape, device: torch.device) -> tuple[Float8Pages, Float8Pages]:
    """Keys and values."""

    def pages(*axes: int) -> Float8Pages:
        blocks = _block_axes(shape)
        # Written a page at a time: numbers of float32 would be four times the cache.
        values = torch.empty((*blocks, *axes), dtype=torch.float8_e4m3fn, device=device)
        for page in values:
            page.copy_(torch.randn(page.shape, device=device))
        # Powers of two, as the codec's: numbers of few digits cost matrix units less power.
        return Float8Pages(values, torch.randint(-3, 1, blocks, device=device).float().exp2())

    return pages(BLOCK_SIZE, shape.dim), pages(shape.dim, BLOCK_SIZE)


def integer_cache(bits: int, scale_bits: int, shape: DecodeShape, q_RTHD: Tensor) -> Cache:
    """Keys per channel and values per token."""
    keys, values = integer_pages(bits, scale_bits, shape, q_RTHD.device)
    run = partial(decode_integers, q_RTHD, keys, values, *_asked(shape, q_RTHD.device))
    return Cache(run, _num_bytes(*keys, *values))


def integer_pages(
    bits: int, scale_bits: int, shape: DecodeShape, device: torch.device
) -> tuple[IntegerPages, IntegerPages]:
    """Keys and values."""

    def pages(grouped: int, contiguous: int) -> IntegerPages:
        blocks = _block_axes(shape)
        codes, high = _random_codes(device, bits, *blocks, grouped, contiguous)
        grid = (*blocks, grouped // _GROUP[bits], contiguous)
        if scale_bits == 8:
            zero = torch.randint(-8, -6, grid, dtype=torch.int8, device=device)
            unit = torch.full(blocks, 16.0, device=device)
            return IntegerPages(codes, _random_bytes(device, *grid), zero, unit, high)
        scale = torch.rand(grid, dtype=torch.float16, device=device) * (4 / 2**bits)
        return IntegerPages(codes, scale, scale * -(2.0 ** (bits - 1)), high=high)

    return pages(BLOCK_SIZE, shape.dim), pages(shape.dim, BLOCK_SIZE)


def rotated_cache(bits: int, shape: DecodeShape, q_RTHD: Tensor) -> Cache:
    """Rotated vectors, the mean of a block's keys apart. The rotations of the queries and of what
    comes out are part of the call."""
    keys, values, rotation_DD = rotated_pages(bits, shape, q_RTHD.device)
    asked = _asked(shape, q_RTHD.device)
    run = partial(decode_rotated, q_RTHD, keys, values, rotation_DD, *asked)
    return Cache(run, _num_bytes(*keys, *values))


def rotated_pages(
    bits: int, shape: DecodeShape, device: torch.device
) -> tuple[RotatedPages, RotatedPages, Tensor]:
    """Keys, values and the rotation."""
    blocks = _block_axes(shape)

    def scales() -> Tensor:
        return torch.rand((*blocks, BLOCK_SIZE), dtype=torch.float16, device=device)

    codes, high = _random_codes(device, bits, *blocks, BLOCK_SIZE, shape.dim)
    mean = torch.randn((*blocks, shape.dim), dtype=torch.float16, device=device)
    keys = RotatedPages(codes, scales(), mean, high)
    codes, high = _random_codes(device, bits, *blocks, shape.dim, BLOCK_SIZE)
    values = RotatedPages(codes, scales(), high=high)
    return keys, values, rotate(torch.eye(shape.dim, device=device)).T.contiguous()


CACHES: Final[Mapping[str, Callable[[DecodeShape, Tensor], Cache]]] = {
    "bf16": exact_cache,
    "fp8": float8_cache,
    "int8": partial(integer_cache, 8, 16),
    "int8 scale_bits=8": partial(integer_cache, 8, 8),
    "int4": partial(integer_cache, 4, 16),
    "int4 scale_bits=8": partial(integer_cache, 4, 8),
    "int3": partial(integer_cache, 3, 16),
    "int2": partial(integer_cache, 2, 16),
    "rotated4": partial(rotated_cache, 4),
    "rotated3": partial(rotated_cache, 3),
    "rotated2": partial(rotated_cache, 2),
}
"""By name; `bf16` first, which the others are compared with."""


def _asked(shape: DecodeShape, device: torch.device) -> tuple[PagedRows, Attention]:
    """All keys of one row, in blocks in any order."""

    def int32(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    blocks_1B = torch.randperm(shape.num_blocks, dtype=torch.int32, device=device)[None]
    rows = PagedRows(blocks_1B, int32(0), int32(shape.num_keys))
    return rows, Attention(scale=shape.dim**-0.5)


def _block_axes(shape: DecodeShape) -> tuple[int, int, int]:
    return (-(-shape.num_blocks // PAGE_BLOCKS), PAGE_BLOCKS, shape.num_kv_heads)


def _random_codes(device: torch.device, bits: int, *shape: int) -> tuple[Tensor, Tensor | None]:
    """Packed along the last axis; of 3 bits, the lower two and the third; of 8, int8."""
    *others, contiguous = shape
    if bits == 3:
        low, high = (_random_bytes(device, *others, contiguous * x // 8) for x in (2, 1))
        return low, high
    codes = _random_bytes(device, *others, contiguous * bits // 8)
    return (codes.view(torch.int8) if bits == 8 else codes), None


def _random_bytes(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def _num_bytes(*planes: Tensor | None) -> int:
    return sum(plane.nbytes for plane in planes if plane is not None)
