"""Writes blocks of keys or values into a cache's pages, in the formats of the codecs: what all
encoding kernels have in common.

The definition of each is the codec's own `encode`, and `store_blocks` of what it gives: the same
bytes, for blocks are shared by their bytes. So kernels divide and round as PyTorch does (half to
even, nothing multiplied and added in one step), and sum in a fixed order, halves of an axis first.

Shape letters: those of `paging.py`; B blocks, S tokens of a block, R and C the second last and the
last axis as stored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.paging import check_contiguous

_ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: beside it a float32 has no digits behind the point, and ties go to even."""


class Blocks(NamedTuple):
    """Blocks that are to be written, and where."""

    x_BKSD: Tensor
    """float32, bfloat16 or float16; channels of a token lie together."""
    block_ids_B: Tensor
    """int32, contiguous: block i of a page array `[pages, N, ...]` is the i % N-th of page
    i // N. No two may be equal."""

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of blocks, heads and tokens. Raises: ValueError where channels do not lie together."""
        block, head, token, channel = self.x_BKSD.stride()
        if channel != 1:
            raise ValueError("the channels of a token must lie together")
        check_contiguous(block_ids_B=self.block_ids_B)
        if len(self.block_ids_B) != len(self.x_BKSD):
            raise ValueError(f"{len(self.x_BKSD)} blocks want as many ids")
        return block, head, token

    @property
    def grid(self) -> tuple[int, int]:
        """A program for each head of each block."""
        return int(self.x_BKSD.shape[0]), int(self.x_BKSD.shape[1])


def store_blocks(planes: Sequence[Tensor], block_ids_B: Tensor, encoded: Sequence[Tensor]) -> None:
    """Write what a codec encoded, `[blocks, ...]` arrays, into arrays `[pages, N, ...]`."""
    ids_B = block_ids_B.long()
    for plane, blocks in zip(planes, encoded, strict=True):
        if blocks.dtype == torch.float8_e4m3fn:
            # Not every device indexes these.
            plane, blocks = plane.view(torch.uint8), blocks.view(torch.uint8)
        plane[ids_B // plane.shape[1], ids_B % plane.shape[1]] = blocks


def page_stride(plane: Tensor, axes: tuple[int, ...]) -> int:
    """Raises: ValueError for a plane that is not of blocks of these axes, heads first."""
    if tuple(plane.shape[2:]) != axes or not plane[0].is_contiguous():
        raise ValueError(f"a plane {tuple(plane.shape)} wants blocks of {axes} that lie together")
    return int(plane.stride(0))


@triton.jit
def place_of(
    block_ids_ptr: tl.tensor, stride_page: tl.tensor, PAGE_BLOCKS: tl.constexpr, SIZE: tl.constexpr
) -> tl.tensor:
    """Where this program's head of its block begins in a plane with SIZE numbers of a head."""
    block = tl.load(block_ids_ptr + tl.program_id(0))
    in_page = block % PAGE_BLOCKS * tl.num_programs(1) + tl.program_id(1)
    return (block // PAGE_BLOCKS).to(tl.int64) * stride_page + in_page * SIZE


@triton.jit
def bounded(x: tl.tensor, limit: tl.constexpr) -> tl.tensor:
    """float32, between -limit and limit."""
    return tl.minimum(tl.maximum(x.to(tl.float32), -limit), limit)


@triton.jit
def rounded(x: tl.tensor) -> tl.tensor:
    """To the nearest whole number, half to even, of numbers below 2^22."""
    return (x + _ROUNDING) - _ROUNDING


@triton.jit
def half_at_least(x: tl.tensor) -> tl.tensor:
    """Smallest float16 that is not below x, whose magnitude is at most 65504."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True)
    above = tl.where(nearest.to(tl.float32) < 0, bits - 1, bits + 1).to(tl.int16)
    return tl.where(nearest.to(tl.float32) < x, above.to(tl.float16, bitcast=True), nearest)


@triton.jit
def half_at_most(x: tl.tensor) -> tl.tensor:
    """Largest float16 that is not above x, likewise."""
    # Not -x, which Triton 3.6 takes for 0 - x: its 0 has another sign.
    above = half_at_least(x * -1.0).to(tl.int16, bitcast=True)
    return (above ^ -0x8000).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def power_of_two_at_least(x: tl.tensor) -> tl.tensor:
    """Smallest normal power of two that is not below x, which is 0 or more."""
    exponent = (x.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    return (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halved_sum(x_IJ: tl.tensor) -> tl.tensor:
    """Sums over the last axis, a power of two: halves are added until one number is left."""
    STEPS: tl.constexpr = tl.standard._log2(x_IJ.shape[1])
    for _ in tl.static_range(STEPS):
        halves = x_IJ.reshape(x_IJ.shape[0], 2, x_IJ.shape[1] // 2).permute(0, 2, 1)
        low, high = tl.split(halves)
        x_IJ = low + high
    return x_IJ.reshape(x_IJ.shape[0])
