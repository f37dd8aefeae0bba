"""Decode over a paged cache of e4m3 floats with one scale per block and KV head, as stored.

    score_t  = scale_k sum_d q_d key_td
    output_d = sum_t (p_t scale_v) value_td

Products are of float16, which every e4m3 number is; queries are brought to at most 1 first. The
scale of a block's values is a boost of its scores, as in `integer_decode.py`, where tokens and
channels are rows too. `packed_plain.decode_float8` is the definition.

Shape letters: those of `paging.py`; S tokens of a block, C channels.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.codes import dot, has_assembly
from kvcluster_kernels.combine import combine
from kvcluster_kernels.integer_tiles import HEADROOM, load_query_fields, sum_weights, zero_sums
from kvcluster_kernels.packed_launch import page_strides, plan_launch
from kvcluster_kernels.paging import (
    ROW_NUMBERS,
    ROW_POINTERS,
    Attention,
    DecodeSettings,
    PagedRows,
    Partial,
    SplitPartials,
    let_next_start,
    load_query_positions,
    overlaps,
    split_tiles,
    wait_for_earlier,
)
from kvcluster_kernels.softmax import column_weights, store_columns, to_base_2, visible_columns


class Float8Pages(NamedTuple):
    """Pages of one array, keys or values."""

    values: Tensor
    """[P, N, K, S, D] of keys, [P, N, K, D, S] of values, float8 e4m3fn; N blocks of a page."""
    scale: Tensor
    """[P, N, K], float32."""


def decode_float8(
    q_RTHD: Tensor,
    keys: Float8Pages,
    values: Float8Pages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> Partial:
    """As `integer_decode.decode_integers`. Raises: ValueError."""
    splits = float8_splits(q_RTHD, keys, values, rows, attention, settings)
    return combine(splits, num_tokens=q_RTHD.shape[1])


def float8_splits(
    q_RTHD: Tensor,
    keys: Float8Pages,
    values: Float8Pages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
    *,
    begins_early: bool = False,
) -> SplitPartials:
    """The same before it is merged, to be merged with more. `begins_early`: as of
    `integer_decode.integer_splits`."""
    num_kv_heads, block_size, dim_k = keys.values.shape[2:]
    dim_v = values.values.shape[3]
    if dim_k != q_RTHD.shape[3] or values.values.shape[4] != block_size:
        raise ValueError(
            f"queries {tuple(q_RTHD.shape)}, keys {tuple(keys.values.shape)} and values "
            f"{tuple(values.values.shape)} do not go together"
        )
    chosen = settings or default_settings()
    launch = plan_launch(q_RTHD, rows, attention, chosen, num_kv_heads=num_kv_heads, dim_v=dim_v)
    early = begins_early and overlaps(q_RTHD.device)
    _float8_kernel[launch.grid](
        q_RTHD,
        *keys,
        *values,
        *launch.arguments,
        *page_strides(keys),
        *page_strides(values),
        **launch.constants,
        BLOCK_SIZE=block_size,
        PAGE_BLOCKS=keys.values.shape[1],
        DIM_K=dim_k,
        DIM_V=dim_v,
        IS_GPU=has_assembly(_float8_kernel),
        BEGINS_EARLY=early,
        launch_pdl=early,
    )
    return launch.found


def default_settings() -> DecodeSettings:
    """The best at 128K tokens that was measured on an H100 (`tests/bench_results`). 64 columns are
    as many as four warps have registers for."""
    return DecodeSettings(num_warps=4, programs_per_processor=2, columns=64)


@triton.jit(do_not_specialize=ROW_NUMBERS, do_not_specialize_on_alignment=ROW_POINTERS)
def _float8_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    block_positions_ptr: tl.tensor,
    q_positions_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    max_blocks: tl.tensor,
    num_splits: tl.tensor,
    stride_k: tl.tensor,
    stride_k_scale: tl.tensor,
    stride_v: tl.tensor,
    stride_v_scale: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    IS_GPU: tl.constexpr,
    BEGINS_EARLY: tl.constexpr,
) -> None:
    BLOCK_DK: tl.constexpr = triton.next_power_of_2(DIM_K)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DIM_V)
    ROW_TILES: tl.constexpr = triton.cdiv(NUM_ROWS, BLOCK_M)
    let_next_start(OVERLAPS)
    split = tl.program_id(0) // ROW_TILES
    rows_M = tl.program_id(0) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    head, num_kv_heads, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, BLOCK_SIZE)
    q_fields, size_M = load_query_fields(
        q_ptr, row, head, num_kv_heads, rows_M, NUM_ROWS, GROUP, DIM_K, 8, IS_SCALED=True
    )
    q_positions_M = load_query_positions(
        q_positions_ptr, row, rows_M, NUM_ROWS, GROUP, HAS_POSITIONS
    )
    blocks_ptr += row.to(tl.int64) * max_blocks
    block_positions_ptr += row.to(tl.int64) * max_blocks
    offs_s = tl.arange(0, BLOCK_SIZE)
    offs_k = tl.arange(0, BLOCK_DK)
    offs_v = tl.arange(0, BLOCK_DV)

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_NM = zero_sums(BLOCK_M)
    acc_DM = tl.zeros([BLOCK_DV, BLOCK_M], tl.float32)
    for tile in tl.range(begin, stop):
        block = tl.load(blocks_ptr + tile)
        page = (block // PAGE_BLOCKS).to(tl.int64)
        place = block % PAGE_BLOCKS * num_kv_heads + head
        k_start = k_ptr + page * stride_k + place * (BLOCK_SIZE * DIM_K)
        k_SC = tl.load(
            k_start + offs_s[:, None] * DIM_K + offs_k[None, :],
            mask=(offs_k < DIM_K)[None, :],
            other=0.0,
        )
        v_start = v_ptr + page * stride_v + place * (BLOCK_SIZE * DIM_V)
        v_DS = tl.load(
            v_start + offs_v[:, None] * BLOCK_SIZE + offs_s[None, :],
            mask=(offs_v < DIM_V)[:, None],
            other=0.0,
        )
        k_scale = tl.load(k_scale_ptr + page * stride_k_scale + place)
        v_scale = tl.load(v_scale_ptr + page * stride_v_scale + place)
        products_SM = tl.zeros([BLOCK_SIZE, BLOCK_M], tl.float32)
        products_SM = dot(k_SC.to(tl.float16), q_fields[0], products_SM, IS_GPU)
        k_scale_M = scale * k_scale * size_M
        scores_SM = to_base_2(products_SM, k_scale_M[None, :], softcap, HAS_SOFTCAP)
        position = tl.load(block_positions_ptr + tile) if HAS_POSITIONS else tile
        scores_SM = visible_columns(
            scores_SM, tile * BLOCK_SIZE, start, end, position, q_positions_M, window,
            HAS_POSITIONS, HAS_WINDOW,
        )  # fmt: skip
        # Scales are powers of two, and there is one, so that weights times it are exact.
        exponent = tl.math.log2(v_scale)
        weights, max_M, decay_M = column_weights((scores_SM,), exponent, HEADROOM, max_M)
        some_NM = sum_weights(weights, IS_GPU)
        sum_NM = sum_NM * decay_M[None, :] + some_NM * tl.math.exp2(-exponent)
        acc_DM = dot(v_DS.to(tl.float16), weights[0], acc_DM * decay_M[None, :], IS_GPU)
    wait_for_earlier(BEGINS_EARLY)
    first_row = ((row * num_kv_heads + head) * num_splits + split) * NUM_ROWS
    store_columns(
        out_ptr, lse_ptr, acc_DM, max_M - HEADROOM, tl.max(sum_NM, 0), first_row, rows_M,
        NUM_ROWS, DIM_V, 0, DIM_V,
    )  # fmt: skip
