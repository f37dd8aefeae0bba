"""Encodes blocks as integers of 8, 4, 3 or 2 bits with a scale and a zero-point for each group
(KIVI, arXiv 2402.02750), and as latents of as many bits: codecs `ChannelQuantizer` for keys and
latents, `TokenQuantizer` for values, whose codec's file says what is stored.

A program has one head of a block. Each of the contiguous numbers C has its own groups, so that the
parts of C that share bytes are worked on one after the other, and meet in the bytes alone.

Shape letters: those of `encode_blocks.py`; G groups, N numbers of a group, Q contiguous numbers of
a part.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.encode_blocks import (
    Blocks,
    bounded,
    half_at_least,
    half_at_most,
    halved_sum,
    page_stride,
    place_of,
    power_of_two_at_least,
    rounded,
)
from kvcluster_kernels.encode_packing import store_codes
from kvcluster_kernels.softmax import append

_MAX_HALF = tl.constexpr(65504.0)
_MAX_BYTE_SCALE = tl.constexpr(1.96875 * 2.0**-8)


class IntegerFormat(NamedTuple):
    """The codec's parameters, as it names them."""

    bits: int
    group: int
    scale_bits: int = 16
    spans: tuple[float, ...] = ()
    is_transposed: bool = False
    """Of values: groups of channels, tokens contiguous."""


def encode_integers(blocks: Blocks, form: IntegerFormat, planes: tuple[Tensor, ...]) -> None:
    """Write blocks into `planes`, `[pages, N, ...]` of what the codec stores, in its order.

    Raises: ValueError for planes of another shape, or groups that are no power of two.
    """
    num_heads, num_tokens, dim = blocks.x_BKSD.shape[1:]
    grouped, contiguous = (dim, num_tokens) if form.is_transposed else (num_tokens, dim)
    group = min(form.group, grouped)
    if group & (group - 1) or grouped % group:
        raise ValueError(f"{grouped} numbers in groups of {group}: want a power of two of them")
    parts = 8 if form.bits == 3 else 8 // form.bits
    if contiguous % parts:
        raise ValueError(f"{contiguous} codes of {form.bits} bits do not fill whole bytes")
    num_code_planes = 2 if form.bits == 3 else 1
    grid = (num_heads, grouped // group, contiguous)
    widths = (4, 8) if form.bits == 3 else (parts,)
    axes: list[tuple[int, ...]] = [(num_heads, grouped, contiguous // width) for width in widths]
    axes += [grid, grid] + ([(num_heads,)] if form.scale_bits == 8 else [])
    strides = [page_stride(x, shape) for x, shape in zip(planes, axes, strict=True)]
    codes, scales = planes[:num_code_planes], planes[num_code_planes:]
    _integer_kernel[blocks.grid](
        blocks.x_BKSD,
        blocks.block_ids_B,
        codes[0],
        codes[-1],
        scales[0],
        scales[1],
        scales[-1],
        *blocks.strides,
        strides[0],
        strides[num_code_planes - 1],
        strides[num_code_planes],
        strides[num_code_planes + 1],
        strides[-1],
        PAGE_BLOCKS=planes[0].shape[1],
        GROUPED=grouped,
        CONTIGUOUS=contiguous,
        GROUP=group,
        BITS=form.bits,
        SCALE_BITS=form.scale_bits,
        NUM_SPANS=len(form.spans),
        SPAN_0=form.spans[0] if form.spans else 1.0,
        SPAN_1=form.spans[-1] if form.spans else 1.0,
        IS_TRANSPOSED=form.is_transposed,
        num_warps=8,
        enable_fp_fusion=False,
    )


@triton.jit
def _nearest_codes(
    x: tl.tensor, scale: tl.tensor, zero: tl.tensor, LEVELS: tl.constexpr
) -> tl.tensor:
    safe_scale = tl.where(scale > 0, scale, 1.0)
    steps = tl.where(scale > 0, tl.div_rn(x - zero, safe_scale + tl.zeros_like(x)), 0.0)
    return rounded(_between(steps, 0.0, LEVELS))


@triton.jit
def _between(x: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _span_error(
    x_GNQ: tl.tensor,
    low_G1Q: tl.tensor,
    high_G1Q: tl.tensor,
    SPAN: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """How far the range is drawn in at both ends, and the squared error of each group then."""
    INSET: tl.constexpr = (1 - SPAN) / 2
    STEP: tl.constexpr = SPAN / LEVELS
    G: tl.constexpr = x_GNQ.shape[0]
    N: tl.constexpr = x_GNQ.shape[1]
    Q: tl.constexpr = x_GNQ.shape[2]
    inset = (high_G1Q - low_G1Q) * INSET
    scale, zero = (high_G1Q - low_G1Q) * STEP, low_G1Q + inset
    off_GNQ = zero + scale * _nearest_codes(x_GNQ, scale, zero, LEVELS) - x_GNQ
    squares = (off_GNQ * off_GNQ).permute(0, 2, 1).reshape(G * Q, N)
    return inset, halved_sum(squares).reshape(G, 1, Q)


@triton.jit
def _ranges(
    x_GNQ: tl.tensor,
    LEVELS: tl.constexpr,
    NUM_SPANS: tl.constexpr,
    SPAN_0: tl.constexpr,
    SPAN_1: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What the codes of each group shall cover."""
    # Of zeros of both signs, devices differ in which is the least; the sum of both is 0.
    low = tl.min(x_GNQ, 1)[:, None, :] + 0.0
    high = tl.max(x_GNQ, 1)[:, None, :] + 0.0
    if NUM_SPANS > 0:
        best, least = _span_error(x_GNQ, low, high, 1.0, LEVELS)
        inset, error = _span_error(x_GNQ, low, high, SPAN_0, LEVELS)
        best = tl.where(error < least, inset, best)
        least = tl.minimum(error, least)
        if NUM_SPANS > 1:
            inset, error = _span_error(x_GNQ, low, high, SPAN_1, LEVELS)
            best = tl.where(error < least, inset, best)
        low = low + best
        high = high - best
    return low, high


@triton.jit
def _byte_step(low: tl.tensor, high: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """The least step with which bytes reach a group's numbers."""
    wanted = tl.maximum(_quotient(high - low, LEVELS), _quotient(-low, 128))
    return tl.maximum(wanted, _quotient(high, LEVELS + 127))


@triton.jit
def _quotient(x: tl.tensor, divisor: tl.constexpr) -> tl.tensor:
    return tl.div_rn(x, tl.full(x.shape, divisor, tl.float32))


@triton.jit
def _half_scales(low: tl.tensor, high: tl.tensor, LEVELS: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Scale and zero-point as they are stored, then as numbers."""
    stored_zero = half_at_most(low)
    zero = stored_zero.to(tl.float32)
    stored_scale = half_at_least(_quotient(high - zero, LEVELS))
    return stored_scale, stored_zero, stored_scale.to(tl.float32), zero


@triton.jit
def _byte_scales(
    low: tl.tensor, high: tl.tensor, unit: tl.tensor, LEVELS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The same in bytes."""
    wanted = _byte_step(low, high, LEVELS)
    halves = half_at_least(tl.div_rn(wanted, tl.zeros_like(wanted) + unit))
    bits = halves.to(tl.int16, bitcast=True).to(tl.int32)
    stored_scale = tl.minimum((bits + 31) >> 5, 255).to(tl.uint8)
    scale = (stored_scale.to(tl.int16) << 5).to(tl.float16, bitcast=True).to(tl.float32) * unit
    multiple = tl.where(scale > 0, tl.div_rn(low, tl.where(scale > 0, scale, 1.0)), 0.0)
    multiple = rounded(_between(multiple, -128.0, 127.0))
    return stored_scale, multiple.to(tl.int8), scale, scale * multiple


@triton.jit
def _integer_kernel(
    x_ptr: tl.tensor,
    block_ids_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    high_codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    stride_block: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    stride_codes: tl.tensor,
    stride_high_codes: tl.tensor,
    stride_scale: tl.tensor,
    stride_zero: tl.tensor,
    stride_unit: tl.tensor,
    PAGE_BLOCKS: tl.constexpr,
    GROUPED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    NUM_SPANS: tl.constexpr,
    SPAN_0: tl.constexpr,
    SPAN_1: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
) -> None:
    PARTS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    COUNT: tl.constexpr = CONTIGUOUS // PARTS
    Q: tl.constexpr = triton.next_power_of_2(COUNT)
    G: tl.constexpr = triton.next_power_of_2(GROUPED // GROUP)
    GRID: tl.constexpr = GROUPED // GROUP * CONTIGUOUS
    offs_r = tl.arange(0, G * GROUP)
    offs_q = tl.arange(0, Q)
    offs_g = tl.arange(0, G)
    mask_RQ = (offs_r < GROUPED)[:, None] & (offs_q < COUNT)[None, :]
    mask_GQ = (offs_g < GROUPED // GROUP)[:, None] & (offs_q < COUNT)[None, :]
    x_ptr += tl.program_id(0).to(tl.int64) * stride_block + tl.program_id(1) * stride_head
    SIZE: tl.constexpr = GROUPED * CONTIGUOUS // 8
    LOW_SIZE: tl.constexpr = SIZE * (2 if BITS == 3 else BITS)
    codes_ptr += place_of(block_ids_ptr, stride_codes, PAGE_BLOCKS, LOW_SIZE)
    high_codes_ptr += place_of(block_ids_ptr, stride_high_codes, PAGE_BLOCKS, SIZE)
    scale_ptr += place_of(block_ids_ptr, stride_scale, PAGE_BLOCKS, GRID)
    zero_ptr += place_of(block_ids_ptr, stride_zero, PAGE_BLOCKS, GRID)

    numbers = ()
    lows = ()
    highs = ()
    largest = 0.0
    for part in tl.static_range(PARTS):
        offs_c = part * COUNT + offs_q
        if IS_TRANSPOSED:
            pointers = x_ptr + offs_c[None, :] * stride_token + offs_r[:, None]
        else:
            pointers = x_ptr + offs_r[:, None] * stride_token + offs_c[None, :]
        x_RQ = bounded(tl.load(pointers, mask=mask_RQ, other=0.0), _MAX_HALF)
        x_GNQ = x_RQ.reshape(G, GROUP, Q)
        low, high = _ranges(x_GNQ, LEVELS, NUM_SPANS, SPAN_0, SPAN_1)
        if SCALE_BITS == 8:
            step = _byte_step(low, high, LEVELS)
            largest = tl.maximum(largest, tl.max(tl.max(tl.max(step, 2), 1), 0))
        numbers = append(numbers, x_GNQ)
        lows = append(lows, low)
        highs = append(highs, high)
    unit = 1.0
    if SCALE_BITS == 8:
        unit = power_of_two_at_least(tl.div_rn(largest, _MAX_BYTE_SCALE))
        tl.store(unit_ptr + place_of(block_ids_ptr, stride_unit, PAGE_BLOCKS, 1), unit)

    packed = ()
    for part in tl.static_range(PARTS):
        if SCALE_BITS == 16:
            stored_scale, stored_zero, scale, zero = _half_scales(lows[part], highs[part], LEVELS)
        else:
            stored_scale, stored_zero, scale, zero = _byte_scales(
                lows[part], highs[part], unit, LEVELS
            )
        grid = offs_g[:, None] * CONTIGUOUS + (part * COUNT + offs_q)[None, :]
        tl.store(scale_ptr + grid, stored_scale.reshape(G, Q), mask=mask_GQ)
        tl.store(zero_ptr + grid, stored_zero.reshape(G, Q), mask=mask_GQ)
        codes = _nearest_codes(numbers[part], scale, zero, LEVELS).to(tl.uint8)
        packed = append(packed, codes.reshape(G * GROUP, Q))

    store_codes(codes_ptr, high_codes_ptr, packed, offs_r, offs_q, mask_RQ, COUNT, BITS)
