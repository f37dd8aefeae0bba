"""Encodes blocks as rotated vectors in 4, 3 or 2 bits (codec `Rotated`; TurboQuant, arXiv
2504.19874): H diag(signs) x / sqrt(D), of unit size, to the nearest level of a codebook.

The Hadamard transform adds in the codec's order: neighbours first, then numbers 2, 4, ... apart.

Shape letters: those of `encode_blocks.py`; D head dimension, Q numbers of a part of the last axis.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.encode_blocks import Blocks, bounded, halved_sum, page_stride, place_of
from kvcluster_kernels.encode_packing import store_codes
from kvcluster_kernels.softmax import append

_MAX_HALF = tl.constexpr(65504.0)


class RotatedFormat(NamedTuple):
    """The codec's parameters, and its constants as float32 on the device of the blocks."""

    bits: int
    levels: Tensor
    """The 2^bits levels, ascending."""
    signs_D: Tensor
    """+1 and -1."""
    is_centred: bool = False
    is_transposed: bool = False


def encode_rotated(blocks: Blocks, form: RotatedFormat, planes: tuple[Tensor, ...]) -> None:
    """Write blocks into `planes`, `[pages, N, ...]` of what the codec stores, in its order.

    Raises: ValueError for planes of another shape, or sizes that are no powers of two.
    """
    num_heads, num_tokens, dim = blocks.x_BKSD.shape[1:]
    if dim < 8 or dim & (dim - 1) or num_tokens < 8 or num_tokens & (num_tokens - 1):
        raise ValueError(f"{num_tokens} tokens of {dim} channels: want powers of two from 8 up")
    rows, contiguous = (dim, num_tokens) if form.is_transposed else (num_tokens, dim)
    widths = {4: (2,), 3: (4, 8), 2: (4,)}[form.bits]
    axes: list[tuple[int, ...]] = [(num_heads, rows, contiguous // width) for width in widths]
    axes += [(num_heads, num_tokens)] + [(num_heads, dim)] * form.is_centred
    strides = [page_stride(x, shape) for x, shape in zip(planes, axes, strict=True)]
    scale = len(widths)
    _rotated_kernel[blocks.grid](
        blocks.x_BKSD,
        blocks.block_ids_B,
        form.levels,
        ((form.levels[1:] + form.levels[:-1]) / 2).contiguous(),
        form.signs_D,
        planes[0],
        planes[scale - 1],
        planes[scale],
        planes[-1],
        *blocks.strides,
        strides[0],
        strides[scale - 1],
        strides[scale],
        strides[-1],
        PAGE_BLOCKS=planes[0].shape[1],
        S=num_tokens,
        D=dim,
        ROOT=math.sqrt(dim),
        BITS=form.bits,
        IS_CENTRED=form.is_centred,
        IS_TRANSPOSED=form.is_transposed,
        num_warps=8,
        enable_fp_fusion=False,
    )


@triton.jit
def _hadamard(x_SD: tl.tensor) -> tl.tensor:
    S: tl.constexpr = x_SD.shape[0]
    D: tl.constexpr = x_SD.shape[1]
    STEPS: tl.constexpr = tl.standard._log2(D)
    sign_2 = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    for step in tl.static_range(STEPS):
        pairs = x_SD.reshape(S, D // (2 << step), 2, 1 << step)
        # A sum of two has one order.
        sums = tl.sum(pairs, 2)[:, :, None, :]
        differences = tl.sum(pairs * sign_2[None, None, :, None], 2)[:, :, None, :]
        chosen = tl.where(sign_2[None, None, :, None] > 0, sums, differences)
        x_SD = chosen.reshape(S, D)
    return x_SD


@triton.jit
def _mean_square(x_SD: tl.tensor) -> tl.tensor:
    # The number of channels is a power of two: to multiply is to divide.
    return halved_sum(x_SD * x_SD) * (1.0 / x_SD.shape[1])


@triton.jit
def _halves(x_IJ: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Of the last axis."""
    low, high = tl.split(x_IJ.reshape(x_IJ.shape[0], 2, x_IJ.shape[1] // 2).permute(0, 2, 1))
    return low, high


@triton.jit
def _parts(x_IJ: tl.tensor, COUNT: tl.constexpr) -> tl.tuple:
    """The last axis in as many parts, in order."""
    parts = ()
    if COUNT == 1:
        parts = append(parts, x_IJ)
    else:
        low, high = _halves(x_IJ)
        parts = _parts(low, COUNT // 2) + _parts(high, COUNT // 2)
    return parts


@triton.jit
def _rotated_kernel(
    x_ptr: tl.tensor,
    block_ids_ptr: tl.tensor,
    levels_ptr: tl.tensor,
    borders_ptr: tl.tensor,
    signs_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    high_codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    stride_block: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_codes: tl.tensor,
    stride_high_codes: tl.tensor,
    stride_scale: tl.tensor,
    stride_mean: tl.tensor,
    PAGE_BLOCKS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    ROOT: tl.constexpr,
    BITS: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
) -> None:
    PARTS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    LOW_BITS: tl.constexpr = 2 if BITS == 3 else BITS
    CONTIGUOUS: tl.constexpr = S if IS_TRANSPOSED else D
    Q: tl.constexpr = CONTIGUOUS // PARTS
    offs_s = tl.arange(0, S)
    offs_d = tl.arange(0, D)
    x_ptr += tl.program_id(0).to(tl.int64) * stride_block + tl.program_id(1) * stride_head
    x_SD = tl.load(x_ptr + offs_s[:, None] * stride_token + offs_d[None, :])
    x_SD = bounded(x_SD, _MAX_HALF)
    if IS_CENTRED:
        mean_D = (halved_sum(tl.trans(x_SD)) * (1.0 / S)).to(tl.float16)
        tl.store(mean_ptr + place_of(block_ids_ptr, stride_mean, PAGE_BLOCKS, D) + offs_d, mean_D)
        x_SD = x_SD - mean_D.to(tl.float32)[None, :]
    rotated_SD = _hadamard(x_SD * tl.load(signs_ptr + offs_d)[None, :])
    rotated_SD = tl.div_rn(rotated_SD, tl.full([S, D], ROOT, tl.float32))
    rms_S = tl.sqrt_rn(_mean_square(rotated_SD))
    safe_rms_S = tl.where(rms_S > 0, rms_S, 1.0)
    unit_SD = tl.div_rn(rotated_SD, tl.zeros_like(rotated_SD) + safe_rms_S[:, None])
    codes_SD = tl.zeros([S, D], tl.int32)
    for border in tl.static_range((1 << BITS) - 1):
        codes_SD += (unit_SD > tl.load(borders_ptr + border)).to(tl.int32)
    level_SD = tl.load(levels_ptr + codes_SD)
    code_rms_S = tl.sqrt_rn(_mean_square(level_SD))
    scale_S = tl.minimum(tl.div_rn(rms_S, code_rms_S), _MAX_HALF).to(tl.float16)
    tl.store(scale_ptr + place_of(block_ids_ptr, stride_scale, PAGE_BLOCKS, S) + offs_s, scale_S)

    stored = codes_SD.to(tl.uint8)
    if IS_TRANSPOSED:
        stored = tl.trans(stored)
    parts = _parts(stored, PARTS)
    codes_ptr += place_of(block_ids_ptr, stride_codes, PAGE_BLOCKS, S * D * LOW_BITS // 8)
    offs_i, offs_q = tl.arange(0, stored.shape[0]), tl.arange(0, Q)
    high_codes_ptr += place_of(block_ids_ptr, stride_high_codes, PAGE_BLOCKS, S * D // 8)
    store_codes(codes_ptr, high_codes_ptr, parts, offs_i, offs_q, offs_i[:, None] >= 0, Q, BITS)
