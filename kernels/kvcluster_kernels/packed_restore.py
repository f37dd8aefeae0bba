"""Restores encoded blocks of a sequence to keys and values in line, which any prefill kernel takes.

It moves what attention of many query rows over the same keys would read as often as it has tiles of
rows, so that its time is small beside theirs; where rows are few, `packed_prefill` reads the blocks
as they are instead. Arithmetic is of float32: numbers are rounded once.

Shape letters: those of `packed_prefill.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.codes import has_assembly
from kvcluster_kernels.float8_decode import Float8Pages
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.packed_launch import page_strides
from kvcluster_kernels.packed_prefill import (
    History,
    format_of,
    padded_columns,
    padded_rows,
    planes_of,
)
from kvcluster_kernels.packed_tiles import block_tile, place_of_column, place_of_row
from kvcluster_kernels.prefill_arguments import Keys

_NUM_WARPS = 8
_MAX_WARPS = 16
_WARP_NUMBERS = 2048
"""Of a tile, for each warp: what its threads have registers for."""


def restore(history: History, key_dim: int, dtype: torch.dtype) -> Keys:
    """All keys and values of the history, in new memory; `packed_prefill_reference.restored` is the
    definition. On a CPU in Triton's interpreter.

    Raises: ValueError for planes that do not go together.
    """
    form = format_of(history, key_dim)
    num_heads, block_tokens = history.num_kv_heads, history.block_tokens
    blocks_N = history.blocks_N[: triton.cdiv(history.num_keys, block_tokens)]
    # Whole blocks: their last tokens are behind the keys, and nothing reads them.
    k_KSD, v_KSD = (
        blocks_N.new_empty((num_heads, len(blocks_N) * block_tokens, dim), dtype=dtype)
        for dim in (key_dim, history.value_dim)
    )
    restore_rows(history.keys, blocks_N, k_KSD, form.k_bits)
    restore_columns(history.values, blocks_N, v_KSD, form.v_bits)
    return Keys(k_KSD[None], v_KSD[None], history.num_keys)


def restore_rows(
    pages: IntegerPages | Float8Pages, blocks_N: Tensor, x_KSD: Tensor, bits: int
) -> None:
    """Write whole blocks, of which a row is the numbers of a token, in line. `bits`: of a code, 0
    for floats."""
    _launch(pages, blocks_N, x_KSD, bits, is_transposed=False)


def restore_columns(
    pages: IntegerPages | Float8Pages, blocks_N: Tensor, x_KSD: Tensor, bits: int
) -> None:
    """The same of blocks of which a column is the numbers of a token, as values are stored."""
    _launch(pages, blocks_N, x_KSD, bits, is_transposed=True)


def _launch(
    pages: IntegerPages | Float8Pages,
    blocks_N: Tensor,
    x_KSD: Tensor,
    bits: int,
    *,
    is_transposed: bool,
) -> None:
    if not len(blocks_N):
        return
    num_heads, num_slots, dim = x_KSD.shape
    planes = planes_of(pages)
    high = pages.high if isinstance(pages, IntegerPages) and pages.high is not None else planes[0]
    groups, scale_bits = 1, 16
    if isinstance(pages, IntegerPages):
        groups, scale_bits = int(pages.scale.shape[3]), 16 if pages.unit is None else 8
    block_tokens = num_slots // len(blocks_N)
    most = block_tokens * int(triton.next_power_of_2(dim)) // _WARP_NUMBERS
    _restore_kernel[(len(blocks_N), num_heads)](
        *planes,
        high,
        blocks_N,
        x_KSD,
        num_slots,
        *page_strides((*planes, high)),
        BLOCK_TOKENS=block_tokens,
        PAGE_BLOCKS=planes[0].shape[1],
        DIM=dim,
        BITS=bits,
        GROUPS=groups,
        SCALE_BITS=scale_bits,
        COLUMNS=padded_columns(dim, bits),
        ROWS=padded_rows(dim, groups),
        IS_TRANSPOSED=is_transposed,
        IS_GPU=has_assembly(_restore_kernel),
        num_warps=max(_NUM_WARPS, min(_MAX_WARPS, most)),
    )


@triton.jit(do_not_specialize=("num_slots",), do_not_specialize_on_alignment=("blocks_ptr",))
def _restore_kernel(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    high_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_slots: tl.tensor,
    stride_codes: tl.tensor,
    stride_scale: tl.tensor,
    stride_zero: tl.tensor,
    stride_unit: tl.tensor,
    stride_high: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    index, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    block = tl.load(blocks_ptr + index)
    page = (block // PAGE_BLOCKS).to(tl.int64)
    place = block % PAGE_BLOCKS * num_heads + head
    planes = (
        codes_ptr, scale_ptr, zero_ptr, unit_ptr,
        stride_codes, stride_scale, stride_zero, stride_unit,
        high_ptr, stride_high,
    )  # fmt: skip
    if IS_TRANSPOSED:
        x_DS, factor = block_tile(
            planes, page, place, DIM, BLOCK_TOKENS, BITS, GROUPS, SCALE_BITS, tl.float32, IS_GPU
        )
        x_SD = tl.trans(x_DS)
        place_D = place_of_row(ROWS, DIM, GROUPS)
    else:
        x_SD, factor = block_tile(
            planes, page, place, BLOCK_TOKENS, DIM, BITS, GROUPS, SCALE_BITS, tl.float32, IS_GPU
        )
        place_D = place_of_column(COLUMNS, DIM, BITS)
    slots_S = head.to(tl.int64) * num_slots + index * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    tl.store(
        x_ptr + slots_S[:, None] * DIM + place_D[None, :],
        (x_SD * factor).to(x_ptr.dtype.element_ty),
        mask=(place_D < DIM)[None, :],
    )
