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


def restore(history: History, key_dim: int, dtype: torch.dtype) -> Keys:
    """All keys and values of the history, in new memory; `packed_prefill_reference.restored` is the
    definition. On a CPU in Triton's interpreter.

    Raises: ValueError for planes that do not go together.
    """
    form = format_of(history, key_dim)
    num_heads, block_tokens = history.num_kv_heads, history.block_tokens
    num_blocks = triton.cdiv(history.num_keys, block_tokens)
    # Whole blocks: their last tokens are behind the keys, and nothing reads them.
    k_KSD, v_KSD = (
        _empty(history.blocks_N, (num_heads, num_blocks * block_tokens, dim), dtype)
        for dim in (key_dim, history.value_dim)
    )
    keys, values = planes_of(history.keys), planes_of(history.values)
    if num_blocks:
        _restore_kernel[(num_blocks, num_heads)](
            *keys,
            *values,
            history.blocks_N,
            k_KSD,
            v_KSD,
            num_blocks * block_tokens,
            *page_strides(keys),
            *page_strides(values),
            BLOCK_TOKENS=block_tokens,
            PAGE_BLOCKS=keys[0].shape[1],
            KEY_DIM=key_dim,
            VALUE_DIM=history.value_dim,
            K_BITS=form.k_bits,
            V_BITS=form.v_bits,
            K_GROUPS=form.k_groups,
            V_GROUPS=form.v_groups,
            SCALE_BITS=form.scale_bits,
            K_COLUMNS=padded_columns(key_dim, form.k_bits),
            V_ROWS=padded_rows(history.value_dim, form.v_groups),
            IS_GPU=has_assembly(_restore_kernel),
            num_warps=_NUM_WARPS,
        )
    return Keys(k_KSD[None], v_KSD[None], history.num_keys)


def _empty(like: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


@triton.jit(do_not_specialize=("num_slots",))
def _restore_kernel(
    k_codes_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    k_zero_ptr: tl.tensor,
    k_unit_ptr: tl.tensor,
    v_codes_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    v_zero_ptr: tl.tensor,
    v_unit_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    num_slots: tl.tensor,
    stride_k_codes: tl.tensor,
    stride_k_scale: tl.tensor,
    stride_k_zero: tl.tensor,
    stride_k_unit: tl.tensor,
    stride_v_codes: tl.tensor,
    stride_v_scale: tl.tensor,
    stride_v_zero: tl.tensor,
    stride_v_unit: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_ROWS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    index, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    block = tl.load(blocks_ptr + index)
    page = (block // PAGE_BLOCKS).to(tl.int64)
    place = block % PAGE_BLOCKS * num_heads + head
    k_planes = (
        k_codes_ptr, k_scale_ptr, k_zero_ptr, k_unit_ptr,
        stride_k_codes, stride_k_scale, stride_k_zero, stride_k_unit,
    )  # fmt: skip
    v_planes = (
        v_codes_ptr, v_scale_ptr, v_zero_ptr, v_unit_ptr,
        stride_v_codes, stride_v_scale, stride_v_zero, stride_v_unit,
    )  # fmt: skip
    slots_S = head.to(tl.int64) * num_slots + index * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    k_SD, factor = block_tile(
        k_planes, page, place, BLOCK_TOKENS, KEY_DIM, K_BITS, K_GROUPS, SCALE_BITS, tl.float32,
        IS_GPU,
    )  # fmt: skip
    place_D = place_of_column(K_COLUMNS, KEY_DIM, K_BITS)
    _store(k_ptr, k_SD * factor, slots_S, place_D, KEY_DIM)
    v_DS, factor = block_tile(
        v_planes, page, place, VALUE_DIM, BLOCK_TOKENS, V_BITS, V_GROUPS, SCALE_BITS, tl.float32,
        IS_GPU,
    )  # fmt: skip
    place_D = place_of_row(V_ROWS, VALUE_DIM, V_GROUPS)
    _store(v_ptr, tl.trans(v_DS) * factor, slots_S, place_D, VALUE_DIM)


@triton.jit
def _store(
    ptr: tl.tensor, x_SD: tl.tensor, slots_S: tl.tensor, place_D: tl.tensor, DIM: tl.constexpr
) -> None:
    tl.store(
        ptr + slots_S[:, None] * DIM + place_D[None, :],
        x_SD.to(ptr.dtype.element_ty),
        mask=(place_D < DIM)[None, :],
    )
