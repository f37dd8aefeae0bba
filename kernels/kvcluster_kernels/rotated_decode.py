"""Decode over a paged cache of rotated vectors in 4, 3 or 2 bits, with a float16 for each token.

    x_t      = mean + scale_t R^T level[codes_t]
    score_t  = scale_t (R q) . level[codes_t] + q . mean
    output   = R^T sum_t (p_t scale_t) level[codes_t]

Queries are rotated once before the launch and outputs once after it, so the loop never rotates.
Only keys have a mean. Tokens and channels are rows of the products and a block is worked on in
parts, as in `integer_decode.py`. `packed_plain.decode_rotated` is the definition.

Shape letters: those of `paging.py`; S tokens of a block, P of a part, C bytes of a row of codes.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.codes import dot, has_assembly, num_fields
from kvcluster_kernels.combine import combine
from kvcluster_kernels.integer_loads import load_levels, load_scales
from kvcluster_kernels.integer_tiles import (
    HEADROOM,
    equal_rows_product,
    load_query_fields,
)
from kvcluster_kernels.levels import BITS
from kvcluster_kernels.packed_gluon_launch import Codes, Planes, pointers, reason_against
from kvcluster_kernels.packed_gluon_launch import splits as hopper_splits
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
    split_tiles,
)
from kvcluster_kernels.softmax import (
    append,
    column_products,
    store_columns,
    to_base_2,
    visible_columns,
)

_LEAST_BYTES = 16
"""Of a row of codes: a matrix product is of 16 numbers at least."""


class RotatedPages(NamedTuple):
    """Pages of one array, as `[pages, blocks of a page, ...]`."""

    codes: Tensor
    """[P, N, K, S, D * bits / 8] of keys, [P, N, K, D, S * bits / 8] of values, uint8."""
    scale: Tensor
    """[P, N, K, S], float16."""
    mean: Tensor | None = None
    """[P, N, K, D], float16, of keys alone."""
    high: Tensor | None = None
    """Of codes of 3 bits the third, one eighth of a byte each, uint8; `codes` has the lower two."""

    @property
    def planes(self) -> Planes:
        """In the order of the kernel for Hopper."""
        return Planes(self.codes, self.high, self.scale, self.mean, None)


def decode_rotated(
    q_RTHD: Tensor,
    keys: RotatedPages,
    values: RotatedPages,
    rotation_DD: Tensor,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> Partial:
    """As `integer_decode.decode_integers`; `rotation_DD` is R, float32, of keys and values both.

    Raises: ValueError for arrays that do not go together.
    """
    splits = rotated_splits(q_RTHD, keys, values, rotation_DD, rows, attention, settings)
    found = combine(splits, num_tokens=q_RTHD.shape[1])
    return found._replace(out_RTHD=found.out_RTHD @ rotation_DD)


def rotated_splits(
    q_RTHD: Tensor,
    keys: RotatedPages,
    values: RotatedPages,
    rotation_DD: Tensor,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> SplitPartials:
    """The same before it is merged and rotated back, to be merged with more of its kind."""
    dim = q_RTHD.shape[3]
    num_kv_heads, block_size = keys.codes.shape[2:4]
    bits = code_bits(keys, dim)
    if rotation_DD.shape != (dim, dim):
        raise ValueError(f"a rotation {tuple(rotation_DD.shape)} of {dim} channels")
    if code_bits(values, block_size) != bits or values.mean is not None:
        raise ValueError(f"values {tuple(values.codes.shape)} want {bits} bits and no mean")
    if min(keys.codes.shape[4], values.codes.shape[4]) < _LEAST_BYTES:
        raise ValueError(f"{bits} bits want {_LEAST_BYTES * 8 // bits} channels and tokens or more")
    rotated_q_RTHD = (q_RTHD.float() @ rotation_DD.T).contiguous()
    codes = Codes(bits, bits, rotated_q_RTHD=rotated_q_RTHD)
    against = reason_against(q_RTHD, keys.planes, values.planes, codes, attention)
    if against is None and not (settings and settings.is_portable):
        return hopper_splits(q_RTHD, keys.planes, values.planes, codes, rows, attention, settings)
    chosen = settings or default_settings(q_RTHD, num_kv_heads, bits)
    launch = plan_launch(q_RTHD, rows, attention, chosen, num_kv_heads=num_kv_heads, dim_v=dim)
    _rotated_kernel[launch.grid](
        q_RTHD,
        rotated_q_RTHD,
        *pointers(keys.planes)[:4],
        *pointers(values.planes)[:3],
        *launch.arguments,
        *page_strides(keys.planes[:4]),
        *page_strides(values.planes[:3]),
        **launch.constants,
        BLOCK_SIZE=block_size,
        PAGE_BLOCKS=keys.codes.shape[1],
        DIM=dim,
        BITS=bits,
        HAS_MEAN=keys.mean is not None,
        IS_GPU=has_assembly(_rotated_kernel),
    )
    return launch.found


def code_bits(pages: RotatedPages, contiguous: int) -> int:
    """Of an array whose codes are packed along an axis of this length. Raises: ValueError."""
    bits, rest = divmod(8 * pages.codes.shape[4], contiguous)
    if rest or bits not in BITS:
        raise ValueError(f"{pages.codes.shape[4]} bytes of {contiguous} codes: want bits in {BITS}")
    return bits if pages.high is None else bits + 1


def default_settings(q_RTHD: Tensor, num_kv_heads: int, bits: int) -> DecodeSettings:
    """As many programs as a processor has registers for."""
    if q_RTHD.shape[1] * q_RTHD.shape[2] // num_kv_heads > 8:
        return DecodeSettings(num_warps=4, programs_per_processor=2)
    if bits == 4:
        return DecodeSettings(num_warps=1, programs_per_processor=8)
    return DecodeSettings(num_warps=2, programs_per_processor=4)


@triton.jit(do_not_specialize=ROW_NUMBERS, do_not_specialize_on_alignment=ROW_POINTERS)
def _rotated_kernel(
    q_ptr: tl.tensor,
    rotated_q_ptr: tl.tensor,
    k_codes_ptr: tl.tensor,
    k_high_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    k_mean_ptr: tl.tensor,
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
    stride_k_mean: tl.tensor,
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
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    PARTS: tl.constexpr = num_fields(BITS)
    K_BYTES: tl.constexpr = DIM // PARTS
    P: tl.constexpr = BLOCK_SIZE // PARTS
    ROW_TILES: tl.constexpr = triton.cdiv(NUM_ROWS, BLOCK_M)
    let_next_start(OVERLAPS)
    split = tl.program_id(0) // ROW_TILES
    rows_M = tl.program_id(0) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    head, num_kv_heads, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, BLOCK_SIZE)
    rotated_q, size_M = load_query_fields(
        rotated_q_ptr, row, head, num_kv_heads, rows_M, NUM_ROWS, GROUP, DIM, BITS, IS_SCALED=False
    )
    plain_q, plain_size_M = load_query_fields(
        q_ptr, row, head, num_kv_heads, rows_M, NUM_ROWS, GROUP, DIM, 8, IS_SCALED=False
    )
    q_positions_M = load_query_positions(
        q_positions_ptr, row, rows_M, NUM_ROWS, GROUP, HAS_POSITIONS
    )
    blocks_ptr += row.to(tl.int64) * max_blocks
    block_positions_ptr += row.to(tl.int64) * max_blocks

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_DM = tl.zeros([DIM, BLOCK_M], tl.float32)
    for tile in tl.range(begin, stop):
        block = tl.load(blocks_ptr + tile)
        page = (block // PAGE_BLOCKS).to(tl.int64)
        place = block % PAGE_BLOCKS * num_kv_heads + head
        k_codes = k_codes_ptr + page * stride_k_codes + place * (BLOCK_SIZE * K_BYTES)
        k_high = k_high_ptr + page * stride_k_high + place * (BLOCK_SIZE * K_BYTES // 2)
        k_scale = k_scale_ptr + page * stride_k_scale + place * BLOCK_SIZE
        v_scale = v_scale_ptr + page * stride_v_scale + place * BLOCK_SIZE
        position = tl.load(block_positions_ptr + tile) if HAS_POSITIONS else tile
        mean_M = tl.zeros([BLOCK_M], tl.float32)
        if HAS_MEAN:
            k_mean = k_mean_ptr + page * stride_k_mean + place * DIM
            mean_M = equal_rows_product(k_mean, plain_q[0], DIM, IS_GPU) * plain_size_M
        scores = ()
        scales = ()
        for part in tl.static_range(PARTS):
            fields = load_levels(k_codes, k_high, part * P, P, K_BYTES, BITS, IS_GPU)
            products_PM = tl.zeros([P, BLOCK_M], tl.float32)
            for field in tl.static_range(PARTS):
                products_PM = dot(fields[field], rotated_q[field], products_PM, IS_GPU)
            scale_P = load_scales(k_scale + part * P, P, P).to(tl.float32)
            products_PM = products_PM * scale_P[:, None] * size_M[None, :] + mean_M[None, :]
            scores_PM = visible_columns(
                to_base_2(products_PM, scale, softcap, HAS_SOFTCAP), tile * BLOCK_SIZE + part * P,
                start, end, position + part * P, q_positions_M, window, HAS_POSITIONS, HAS_WINDOW,
            )  # fmt: skip
            scores = append(scores, scores_PM)
            scales = append(scales, load_scales(v_scale + part * P, P, P).to(tl.float32))
        products, max_M, sum_M, decay_M = column_products(scores, scales, HEADROOM, max_M, sum_M)
        v_codes = v_codes_ptr + page * stride_v_codes + place * (DIM * P)
        v_high = v_high_ptr + page * stride_v_high + place * (DIM * P // 2)
        fields = load_levels(v_codes, v_high, 0, DIM, P, BITS, IS_GPU)
        acc_DM = acc_DM * decay_M[None, :]
        for part in tl.static_range(PARTS):
            acc_DM = dot(fields[part], products[part], acc_DM, IS_GPU)
    first = ((row * num_kv_heads + head) * num_splits + split) * NUM_ROWS
    max_M = max_M - HEADROOM
    store_columns(out_ptr, lse_ptr, acc_DM, max_M, sum_M, first, rows_M, NUM_ROWS, DIM, 0, DIM)
