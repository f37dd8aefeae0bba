"""Decode over a paged cache of integer keys beside rotated values, which bear fewer bits.

Scores are those of `integer_decode.py`, sums of values those of `rotated_decode.py`: a block is
worked on in as many parts as a byte of values has fields. Outputs are rotated back once.

`decode_mixed_plain` is the definition. Shape letters: those of `integer_decode.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.codes import dot, has_assembly, num_fields, row_bytes
from kvcluster_kernels.combine import combine
from kvcluster_kernels.decode_plain import attend_tokens
from kvcluster_kernels.integer_decode import IntegerPages, code_bits, default_settings
from kvcluster_kernels.integer_loads import load_levels, load_scales
from kvcluster_kernels.integer_tiles import HEADROOM, key_unit, load_query_fields, score_block
from kvcluster_kernels.packed_gluon_launch import pointers
from kvcluster_kernels.packed_launch import page_strides, plan_launch
from kvcluster_kernels.packed_plain import in_line, restore_integers, restore_rotated_values
from kvcluster_kernels.paging import (
    ROW_NUMBERS,
    ROW_POINTERS,
    Attention,
    DecodeSettings,
    PagedRows,
    Partial,
    let_next_start,
    load_query_positions,
    split_tiles,
)
from kvcluster_kernels.rotated_decode import RotatedPages
from kvcluster_kernels.rotated_decode import code_bits as rotated_bits
from kvcluster_kernels.softmax import append, column_products, store_columns

_LEAST = 16
"""Numbers that a matrix product sums over, at least."""


def reason_against(keys: IntegerPages, values: RotatedPages, dim: int) -> str | None:
    """Why these pages are not read; None: they are."""
    block_size = keys.codes.shape[3]
    parts = num_fields(rotated_bits(values, block_size))
    k_groups = keys.scale.shape[3]
    if min(row_bytes(dim, code_bits(keys, dim)), block_size // parts) < _LEAST:
        return f"heads of {dim} channels and blocks of {block_size} tokens are too small"
    if parts % k_groups or block_size // k_groups < _LEAST:
        return f"{k_groups} groups of keys in a block do not fit {parts} parts"
    return None if values.mean is None else "values have a mean"


def decode_mixed(
    q_RTHD: Tensor,
    keys: IntegerPages,
    values: RotatedPages,
    rotation_DD: Tensor,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> Partial:
    """Attention of each row's query tokens over its encoded blocks. `rotation_DD` is R of values,
    float32.

    Raises: ValueError for arrays that do not go together.
    """
    reason = reason_against(keys, values, q_RTHD.shape[3])
    if reason is not None:
        raise ValueError(reason)
    num_kv_heads, block_size = keys.codes.shape[2:4]
    k_bits, dim_v = code_bits(keys, q_RTHD.shape[3]), values.codes.shape[3]
    chosen = settings or default_settings(q_RTHD, num_kv_heads, k_bits)
    launch = plan_launch(q_RTHD, rows, attention, chosen, num_kv_heads=num_kv_heads, dim_v=dim_v)
    _mixed_kernel[launch.grid](
        q_RTHD,
        *pointers(keys.planes),
        *pointers(values.planes)[:3],
        *launch.arguments,
        *page_strides(keys.planes),
        *page_strides(values.planes[:3]),
        **launch.constants,
        BLOCK_SIZE=block_size,
        PAGE_BLOCKS=keys.codes.shape[1],
        DIM_K=q_RTHD.shape[3],
        DIM_V=dim_v,
        K_BITS=k_bits,
        V_BITS=rotated_bits(values, block_size),
        K_GROUPS=keys.scale.shape[3],
        SCALE_BITS=16 if keys.unit is None else 8,
        IS_GPU=has_assembly(_mixed_kernel),
    )
    found = combine(launch.found, num_tokens=q_RTHD.shape[1])
    return found._replace(out_RTHD=found.out_RTHD @ rotation_DD)


def decode_mixed_plain(
    q_RTHD: Tensor,
    keys: IntegerPages,
    values: RotatedPages,
    rotation_DD: Tensor,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,  # noqa: ARG001
) -> Partial:
    """The same in PyTorch; computed in float64 where queries are, else in float32."""
    dtype = torch.promote_types(q_RTHD.dtype, torch.float32)
    k_RBKSD = restore_integers(keys, rows.blocks_RB, q_RTHD.shape[3], dtype)
    v_RBKSD = restore_rotated_values(values, rotation_DD.to(dtype), rows.blocks_RB)
    return attend_tokens(q_RTHD, in_line(k_RBKSD), in_line(v_RBKSD), rows, attention)


@triton.jit(do_not_specialize=ROW_NUMBERS, do_not_specialize_on_alignment=ROW_POINTERS)
def _mixed_kernel(
    q_ptr: tl.tensor,
    k_codes_ptr: tl.tensor,
    k_high_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    k_zero_ptr: tl.tensor,
    k_unit_ptr: tl.tensor,
    v_codes_ptr: tl.tensor,
    v_high_ptr: tl.tensor,
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
    stride_k_codes: tl.tensor,
    stride_k_high: tl.tensor,
    stride_k_scale: tl.tensor,
    stride_k_zero: tl.tensor,
    stride_k_unit: tl.tensor,
    stride_v_codes: tl.tensor,
    stride_v_high: tl.tensor,
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
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    K_BYTES: tl.constexpr = row_bytes(DIM_K, K_BITS)
    PARTS: tl.constexpr = num_fields(V_BITS)
    P: tl.constexpr = BLOCK_SIZE // PARTS
    ROW_TILES: tl.constexpr = triton.cdiv(NUM_ROWS, BLOCK_M)
    let_next_start(OVERLAPS)
    split, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    rows_M = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head, num_kv_heads, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, BLOCK_SIZE)
    q_fields, size_M = load_query_fields(
        q_ptr, row, head, num_kv_heads, rows_M, NUM_ROWS, GROUP, DIM_K, K_BITS, IS_SCALED=True
    )
    q_positions_M = load_query_positions(
        q_positions_ptr, row, rows_M, NUM_ROWS, GROUP, HAS_POSITIONS
    )
    blocks_ptr += row.to(tl.int64) * max_blocks
    block_positions_ptr += row.to(tl.int64) * max_blocks

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_DM = tl.zeros([DIM_V, BLOCK_M], tl.float32)
    for tile in tl.range(begin, stop):
        block = tl.load(blocks_ptr + tile)
        page = (block // PAGE_BLOCKS).to(tl.int64)
        place = block % PAGE_BLOCKS * num_kv_heads + head
        k_codes = k_codes_ptr + page * stride_k_codes + place * (BLOCK_SIZE * K_BYTES)
        k_high = k_high_ptr + page * stride_k_high + place * (BLOCK_SIZE * K_BYTES // 2)
        k_scale = k_scale_ptr + page * stride_k_scale + place * (K_GROUPS * DIM_K)
        k_zero = k_zero_ptr + page * stride_k_zero + place * (K_GROUPS * DIM_K)
        k_unit = key_unit(k_unit_ptr + page * stride_k_unit + place, SCALE_BITS)
        position = tl.load(block_positions_ptr + tile) if HAS_POSITIONS else tile
        scores = score_block(
            k_codes, k_high, k_scale, k_zero, q_fields, scale * k_unit * size_M, softcap,
            tile * BLOCK_SIZE, start, end, position, q_positions_M, window,
            BLOCK_SIZE, PARTS, DIM_K, K_BITS, K_GROUPS,
            HAS_POSITIONS, HAS_SOFTCAP, HAS_WINDOW, IS_GPU,
        )  # fmt: skip
        v_scale = v_scale_ptr + page * stride_v_scale + place * BLOCK_SIZE
        scales = ()
        for part in tl.static_range(PARTS):
            scales = append(scales, load_scales(v_scale + part * P, P, P).to(tl.float32))
        products, max_M, sum_M, decay_M = column_products(scores, scales, HEADROOM, max_M, sum_M)
        v_codes = v_codes_ptr + page * stride_v_codes + place * (DIM_V * P)
        v_high = v_high_ptr + page * stride_v_high + place * (DIM_V * P // 2)
        fields = load_levels(v_codes, v_high, 0, DIM_V, P, V_BITS, IS_GPU)
        acc_DM = acc_DM * decay_M[None, :]
        for part in tl.static_range(PARTS):
            acc_DM = dot(fields[part], products[part], acc_DM, IS_GPU)
    first = ((row * num_kv_heads + head) * num_splits + split) * NUM_ROWS
    store_columns(
        out_ptr, lse_ptr, acc_DM, max_M - HEADROOM, sum_M, first, rows_M, NUM_ROWS, DIM_V, 0, DIM_V
    )
