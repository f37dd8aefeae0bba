"""Encodes blocks as e4m3 floats under one scale for each head (codec `Float8`), or as numbers of 16
bits (codec `ExactArray`, which latents are stored with as well).

Bytes of e4m3 are made from the bits of a float32, of whose mantissa 3 stay, half to even: the same
on every processor and in the interpreter, which converts otherwise.

Shape letters: those of `encode_blocks.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.encode_blocks import (
    Blocks,
    bounded,
    page_stride,
    place_of,
    power_of_two_at_least,
    rounded,
)

_MAX_FLOAT8 = tl.constexpr(448.0)
_MAX_NUMBER = tl.constexpr(1.875 * 2.0**127)
_LEAST_NORMAL = tl.constexpr(2.0**-6)


def encode_float8(
    blocks: Blocks, planes: tuple[Tensor, Tensor], *, is_transposed: bool = False
) -> None:
    """Write blocks into values `[pages, N, K, R, C]` and scales `[pages, N, K]`. `is_transposed`:
    tokens contiguous, as values are stored.

    Raises: ValueError for planes of another shape.
    """
    num_heads, num_tokens, dim = blocks.x_BKSD.shape[1:]
    axes = (dim, num_tokens) if is_transposed else (num_tokens, dim)
    values, scale = planes
    _float8_kernel[blocks.grid](
        blocks.x_BKSD,
        blocks.block_ids_B,
        values.view(torch.uint8),
        scale,
        *blocks.strides,
        page_stride(values, (num_heads, *axes)),
        page_stride(scale, (num_heads,)),
        PAGE_BLOCKS=values.shape[1],
        NUM_TOKENS=num_tokens,
        DIM=dim,
        IS_TRANSPOSED=is_transposed,
        num_warps=4,
        enable_fp_fusion=False,
    )


def encode_halves(blocks: Blocks, plane: Tensor) -> None:
    """Write blocks into `[pages, N, K, S, D]` of float16 or bfloat16.

    Raises: ValueError for a plane of another shape.
    """
    num_heads, num_tokens, dim = blocks.x_BKSD.shape[1:]
    _halves_kernel[blocks.grid](
        blocks.x_BKSD,
        blocks.block_ids_B,
        plane,
        *blocks.strides,
        page_stride(plane, (num_heads, num_tokens, dim)),
        PAGE_BLOCKS=plane.shape[1],
        NUM_TOKENS=num_tokens,
        DIM=dim,
        LIMIT=torch.finfo(plane.dtype).max,
        num_warps=4,
    )


@triton.jit
def _load_block(
    x_ptr: tl.tensor,
    stride_block: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    NUM_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """This program's head of its block, [S, D], zeros behind it, and places and mask of it."""
    offs_s = tl.arange(0, triton.next_power_of_2(NUM_TOKENS))[:, None]
    offs_d = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    mask_SD = (offs_s < NUM_TOKENS) & (offs_d < DIM)
    x_ptr += tl.program_id(0).to(tl.int64) * stride_block + tl.program_id(1) * stride_head
    x_SD = tl.load(x_ptr + offs_s * stride_token + offs_d, mask=mask_SD, other=0.0)
    return x_SD.to(tl.float32), offs_s, offs_d, mask_SD


@triton.jit
def float8_bits(x: tl.tensor) -> tl.tensor:
    """Bytes of e4m3 that are nearest to float32 numbers of at most 448, half to even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Of normal numbers, the exponent's bias is 7 instead of 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # The others are multiples of 2^-9.
    tiny = rounded(tl.abs(x) * 512.0).to(tl.int32)
    return (tl.where(tl.abs(x) < _LEAST_NORMAL, tiny, normal) | sign).to(tl.uint8)


@triton.jit
def _float8_kernel(
    x_ptr: tl.tensor,
    block_ids_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    stride_block: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_values: tl.tensor,
    stride_scale: tl.tensor,
    PAGE_BLOCKS: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
) -> None:
    x_SD, offs_s, offs_d, mask_SD = _load_block(
        x_ptr, stride_block, stride_head, stride_token, NUM_TOKENS, DIM
    )
    x_SD = bounded(x_SD, _MAX_NUMBER)
    largest = tl.max(tl.max(tl.abs(x_SD), 1), 0)
    scale = power_of_two_at_least(tl.div_rn(largest, _MAX_FLOAT8))
    # Of a power of two the reciprocal is exact.
    values_SD = bounded(x_SD * tl.div_rn(1.0, scale), _MAX_FLOAT8)
    places = offs_d * NUM_TOKENS + offs_s if IS_TRANSPOSED else offs_s * DIM + offs_d
    values_ptr += place_of(block_ids_ptr, stride_values, PAGE_BLOCKS, NUM_TOKENS * DIM)
    tl.store(values_ptr + places, float8_bits(values_SD), mask=mask_SD)
    tl.store(scale_ptr + place_of(block_ids_ptr, stride_scale, PAGE_BLOCKS, 1), scale)


@triton.jit
def _halves_kernel(
    x_ptr: tl.tensor,
    block_ids_ptr: tl.tensor,
    plane_ptr: tl.tensor,
    stride_block: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_plane: tl.tensor,
    PAGE_BLOCKS: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    x_SD, offs_s, offs_d, mask_SD = _load_block(
        x_ptr, stride_block, stride_head, stride_token, NUM_TOKENS, DIM
    )
    x_SD = bounded(x_SD, LIMIT)
    plane_ptr += place_of(block_ids_ptr, stride_plane, PAGE_BLOCKS, NUM_TOKENS * DIM)
    if plane_ptr.dtype.element_ty == tl.bfloat16:
        # The interpreter cuts bfloat16 off: it is rounded here, half to even.
        bits = x_SD.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored_SD = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        stored_SD = x_SD.to(tl.float16)
    tl.store(plane_ptr + offs_s * DIM + offs_d, stored_SD, mask=mask_SD)
