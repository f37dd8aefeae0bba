"""Prefill attention over encoded blocks in portable Triton: each is restored to float16 as it is
multiplied, once for all query rows of a program.

    score_t  = factor_t sum_d q_d key_td
    output_d = sum_t (p_t factor_t) value_td

A program holds BLOCK_M rows of one KV head, as in `prefill_tl_kernel.py`, and walks over blocks.
What is one number for a whole block is not multiplied into its tile: the factor of its keys goes
into the exponent, that of its values is a boost of its scores that sums of weights are divided by
again. Queries are brought to at most 1, and the largest weight is 2^HEADROOM, because float16 has
few exponents.

Shape letters: those of `prefill_tl_kernel.py`; S tokens of a block.
"""

import triton
import triton.language as tl

from kvcluster_kernels.codes import dot
from kvcluster_kernels.packed_tiles import block_tile, place_of_column, place_of_row

# A compilation takes seconds: none because of a length.
_NUMBERS = ("num_tokens", "num_keys")
_HEADROOM = tl.constexpr(15.0)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_queries(
    q_ptr,
    tokens_M,
    heads_M,
    mask_M,
    stride_t,
    stride_h,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """q_MD in the order of a tile's columns, float16, at most 1, and what it was divided by."""
    place_D = place_of_column(COLUMNS, DIM, BITS)
    rows_M = q_ptr + tokens_M.to(tl.int64) * stride_t + heads_M * stride_h
    mask_MD = mask_M[:, None] & (place_D < DIM)[None, :]
    q_MD = tl.load(rows_M[:, None] + place_D[None, :], mask=mask_MD, other=0.0).to(tl.float32)
    largest_M = tl.max(tl.abs(q_MD), 1)
    exponent_M = tl.math.ceil(tl.math.log2(tl.where(largest_M > 0, largest_M, 1.0)))
    q_MD = q_MD * tl.exp2(-exponent_M)[:, None]
    return q_MD.to(tl.float16), tl.exp2(exponent_M)


@triton.jit
def _fold_blocks(
    acc_MD,
    max2_M,
    sum_M,
    q_MD,
    scale2_M,
    k_planes,
    v_planes,
    blocks_ptr,
    head,
    first,
    last,
    num_keys,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    MASKED: tl.constexpr,
    IS_GPU: tl.constexpr,
):
    """The online softmax of these rows over blocks first .. last; keys that are not there are only
    left out where MASKED."""
    for index in tl.range(first, last):
        block = tl.load(blocks_ptr + index)
        page = (block // PAGE_BLOCKS).to(tl.int64)
        place = block % PAGE_BLOCKS * NUM_KV_HEADS + head
        k_SD, k_factor = block_tile(
            k_planes,
            page,
            place,
            BLOCK_TOKENS,
            KEY_DIM,
            K_BITS,
            K_GROUPS,
            SCALE_BITS,
            tl.float16,
            IS_GPU,
        )
        products_MS = tl.zeros([q_MD.shape[0], BLOCK_TOKENS], tl.float32)
        products_MS = dot(q_MD, tl.trans(k_SD), products_MS, IS_GPU)
        factor_M = scale2_M * k_factor
        if MASKED:
            mask_S = index * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS) < num_keys
            products_MS = tl.where(mask_S[None, :], products_MS, float("-inf"))
        v_DS, v_factor = block_tile(
            v_planes,
            page,
            place,
            VALUE_DIM,
            BLOCK_TOKENS,
            V_BITS,
            V_GROUPS,
            SCALE_BITS,
            tl.float16,
            IS_GPU,
        )
        boost = tl.log2(tl.zeros([1], tl.float32) + v_factor)
        # Every block has a key, so that no maximum is that of nothing.
        new_max2_M = tl.maximum(max2_M, tl.max(products_MS, 1) * factor_M + boost)
        lowered_M = new_max2_M - (boost + _HEADROOM)
        weights_MS = tl.exp2(products_MS * factor_M[:, None] - lowered_M[:, None])
        decay_M = tl.exp2(max2_M - new_max2_M)
        sum_M = sum_M * decay_M + tl.sum(weights_MS, 1) * tl.exp2(-boost)
        max2_M = new_max2_M
        acc_MD = acc_MD * decay_M[:, None]
        acc_MD = dot(weights_MS.to(tl.float16), tl.trans(v_DS), acc_MD, IS_GPU)
    return acc_MD, max2_M, sum_M


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=("blocks_ptr",))
def packed_prefill_kernel(
    q_ptr,
    k_codes_ptr,
    k_scale_ptr,
    k_zero_ptr,
    k_unit_ptr,
    v_codes_ptr,
    v_scale_ptr,
    v_zero_ptr,
    v_unit_ptr,
    blocks_ptr,
    out_ptr,
    lse_ptr,
    carry_out_ptr,
    carry_lse_ptr,
    num_tokens,
    num_keys,
    scale2,
    stride_q_t,
    stride_q_h,
    stride_k_codes,
    stride_k_scale,
    stride_k_zero,
    stride_k_unit,
    stride_v_codes,
    stride_v_scale,
    stride_v_zero,
    stride_v_unit,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
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
    CARRIED: tl.constexpr,
    IS_GPU: tl.constexpr,
):
    num_tiles = tl.cdiv(num_tokens * GROUP, BLOCK_M)
    # Programs that run together read the same blocks.
    row_tile = tl.program_id(0) % num_tiles
    head = tl.program_id(0) // num_tiles
    part = tl.program_id(1)
    rows_M = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens_M = rows_M // GROUP
    heads_M = head * GROUP + rows_M % GROUP
    mask_M = tokens_M < num_tokens
    q_MD, size_M = _load_queries(
        q_ptr, tokens_M, heads_M, mask_M, stride_q_t, stride_q_h, KEY_DIM, K_BITS, K_COLUMNS
    )
    scale2_M = size_M * scale2
    num_blocks = tl.cdiv(num_keys, BLOCK_TOKENS)
    share = tl.cdiv(num_blocks, tl.num_programs(1))
    begin = tl.minimum(num_blocks, part * share)
    end = tl.minimum(num_blocks, begin + share)

    max2_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, V_ROWS], tl.float32)
    k_planes = (
        k_codes_ptr, k_scale_ptr, k_zero_ptr, k_unit_ptr,
        stride_k_codes, stride_k_scale, stride_k_zero, stride_k_unit,
    )  # fmt: skip
    v_planes = (
        v_codes_ptr, v_scale_ptr, v_zero_ptr, v_unit_ptr,
        stride_v_codes, stride_v_scale, stride_v_zero, stride_v_unit,
    )  # fmt: skip
    # All blocks but a last one that is not full.
    whole = tl.maximum(begin, tl.minimum(end, num_keys // BLOCK_TOKENS))
    for masked in tl.static_range(2):
        acc_MD, max2_M, sum_M = _fold_blocks(
            acc_MD,
            max2_M,
            sum_M,
            q_MD,
            scale2_M,
            k_planes,
            v_planes,
            blocks_ptr,
            head,
            whole if masked else begin,
            end if masked else whole,
            num_keys,
            NUM_KV_HEADS,
            BLOCK_TOKENS,
            PAGE_BLOCKS,
            KEY_DIM,
            VALUE_DIM,
            K_BITS,
            V_BITS,
            K_GROUPS,
            V_GROUPS,
            SCALE_BITS,
            MASKED=masked == 1,
            IS_GPU=IS_GPU,
        )
    max2_M = max2_M - _HEADROOM
    own_M = tokens_M.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads_M
    place_D = place_of_row(V_ROWS, VALUE_DIM, V_GROUPS)
    mask_MD = mask_M[:, None] & (place_D < VALUE_DIM)[None, :]
    factor_M = tl.full([BLOCK_M], 1.0, tl.float32)
    if CARRIED:
        carry2_M = tl.load(carry_lse_ptr + own_M, mask=mask_M, other=float("-inf")) * _LOG2_E
        new_max2_M = tl.maximum(max2_M, carry2_M)
        shift_M = tl.where(new_max2_M == float("-inf"), 0.0, new_max2_M)
        factor_M = tl.exp2(max2_M - shift_M)
        share_M = tl.exp2(carry2_M - shift_M)
        sum_M = sum_M * factor_M + share_M
        max2_M = new_max2_M
    seen_M = sum_M > 0.0
    divisor_M = tl.where(seen_M, sum_M, 1.0)
    out_MD = acc_MD * (factor_M / divisor_M)[:, None]
    if CARRIED:
        carry_ptrs = (carry_out_ptr + own_M * VALUE_DIM)[:, None] + place_D[None, :]
        carry_MD = tl.load(carry_ptrs, mask=mask_MD, other=0.0)
        out_MD += carry_MD * (share_M / divisor_M)[:, None]
    own_M += part.to(tl.int64) * num_tokens * (NUM_KV_HEADS * GROUP)
    tl.store(
        (out_ptr + own_M * VALUE_DIM)[:, None] + place_D[None, :],
        out_MD.to(out_ptr.dtype.element_ty),
        mask=mask_MD,
    )
    lse_M = tl.where(seen_M, (max2_M + tl.log2(divisor_M)) * _LN_2, float("-inf"))
    tl.store(lse_ptr + own_M, lse_M, mask=mask_M)
