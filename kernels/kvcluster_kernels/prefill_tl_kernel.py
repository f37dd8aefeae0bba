"""Prefill attention in portable Triton: any head size up to 256, every rule, in line or paged.

One program holds BLOCK_M rows of one KV head and walks over its keys (Dao 2023, FlashAttention-2,
algorithm 1). A row is one query head of one token: the query heads that share a KV head are
neighbours, so that its keys are read once for all of them. Logits are kept in base 2, in which the
processor exponentiates; results leave in the natural one.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension, Z splits.
"""

import triton
import triton.language as tl

from kvcluster_kernels.prefill_tl_keys import fold_keys, load_rows

LOG2_E = tl.constexpr(1.4426950408889634)
# A compilation takes seconds: none because of a length.
_NUMBERS = ("num_tokens", "num_keys", "start", "split", "resume", "window", "lag")
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _positions(tokens, start, split, resume):
    """Where among the keys these rows lie."""
    return tl.where(tokens < split, tokens + start, tokens + (resume - split))


@triton.jit
def _seen(
    positions,
    window,
    lag,
    WINDOWED: tl.constexpr,
    BOUND_TOKENS: tl.constexpr,
    IS_BEFORE: tl.constexpr,
):
    """The first and the last key that rows at these positions see, as far as there are keys."""
    first = positions * 0
    last = positions
    if WINDOWED:
        first = tl.maximum(first, positions - window + 1)
    if BOUND_TOKENS > 0:
        place = tl.maximum(positions // BOUND_TOKENS - lag, 0) * BOUND_TOKENS
        if IS_BEFORE:
            last = place - 1
        else:
            first = tl.maximum(first, place)
    return first, last


@triton.jit
def _meet(one2_M, other2_M):
    """The maximum of two logarithms, and what either weighs beside it. Both may be -inf."""
    max2_M = tl.maximum(one2_M, other2_M)
    shift_M = tl.where(max2_M == float("-inf"), 0.0, max2_M)
    return max2_M, tl.exp2(one2_M - shift_M), tl.exp2(other2_M - shift_M)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=("blocks_ptr",))
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    blocks_ptr,
    carry_out_ptr,
    carry_lse_ptr,
    sinks_ptr,
    num_tokens,
    num_keys,
    start,
    split,
    resume,
    window,
    lag,
    scale2,
    softcap2,
    stride_q_t,
    stride_q_h,
    stride_k_p,
    stride_k_h,
    stride_k_s,
    stride_v_p,
    stride_v_h,
    stride_v_s,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUND_TOKENS: tl.constexpr,
    IS_BEFORE: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    CARRIED: tl.constexpr,
    SINKS: tl.constexpr,
    COPIED: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_tiles = tl.cdiv(num_tokens * GROUP, BLOCK_M)
    if CAUSAL:
        # The longest walks first, so that none of them is left over at the end.
        tile = num_tiles - 1 - tl.program_id(0) // NUM_KV_HEADS
        head = tl.program_id(0) % NUM_KV_HEADS
    else:
        # Programs that run together read the same keys.
        tile = tl.program_id(0) % num_tiles
        head = tl.program_id(0) // num_tiles
    part = tl.program_id(1)
    rows_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens_M = rows_M // GROUP
    heads_M = head * GROUP + rows_M % GROUP
    row_mask_M = tokens_M < num_tokens
    offs_k_D = tl.arange(0, PADDED_KEY_DIM)
    offs_v_D = tl.arange(0, PADDED_VALUE_DIM)
    q_rows_M = q_ptr + tokens_M.to(tl.int64) * stride_q_t + heads_M * stride_q_h
    q_MD = load_rows(q_rows_M, offs_k_D, row_mask_M, KEY_DIM, MASKED=True)
    if UPCAST:
        q_MD = q_MD.to(tl.float32)

    # Keys begin .. plain are seen by all rows of the tile, those up to `end` by some of them.
    begin = 0
    end = num_keys
    plain = num_keys // BLOCK_N * BLOCK_N
    HAS_FIRST: tl.constexpr = WINDOWED or (BOUND_TOKENS > 0 and not IS_BEFORE)
    positions_M = _positions(tokens_M, start, split, resume)
    seen_first_M, seen_last_M = _seen(positions_M, window, lag, WINDOWED, BOUND_TOKENS, IS_BEFORE)
    if CAUSAL:
        lowest = _positions(tile * BLOCK_M // GROUP, start, split, resume)
        last_token = tl.minimum(num_tokens - 1, (tile * BLOCK_M + BLOCK_M - 1) // GROUP)
        highest = _positions(last_token, start, split, resume)
        lowest_first, lowest_last = _seen(lowest, window, lag, WINDOWED, BOUND_TOKENS, IS_BEFORE)
        _, highest_last = _seen(highest, window, lag, WINDOWED, BOUND_TOKENS, IS_BEFORE)
        end = tl.maximum(0, tl.minimum(num_keys, highest_last + 1))
        plain = tl.minimum(plain, tl.maximum(0, lowest_last + 1) // BLOCK_N * BLOCK_N)
        if HAS_FIRST:
            begin = tl.minimum(end, lowest_first) // BLOCK_N * BLOCK_N
            plain = begin
    if IS_SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), tl.num_programs(1)) * BLOCK_N
        begin = tl.minimum(end, begin + part * share)
        end = tl.minimum(end, begin + share)
        plain = tl.maximum(begin, tl.minimum(plain, end // BLOCK_N * BLOCK_N))

    max2_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, PADDED_VALUE_DIM], tl.float32)
    head = head.to(tl.int64)
    if COPIED:
        stride_k_p = head.to(tl.int32)
        stride_v_p = head.to(tl.int32)
    else:
        k_ptr += head * stride_k_h
        v_ptr += head * stride_v_h
    acc_MD, max2_M, sum_M = fold_keys(
        acc_MD,
        max2_M,
        sum_M,
        q_MD,
        k_ptr,
        v_ptr,
        blocks_ptr,
        stride_k_p,
        stride_k_s,
        stride_v_p,
        stride_v_s,
        seen_first_M,
        seen_last_M,
        begin,
        plain,
        end,
        num_keys,
        scale2,
        softcap2,
        BLOCK_N,
        KEY_DIM,
        VALUE_DIM,
        PADDED_KEY_DIM,
        PADDED_VALUE_DIM,
        BLOCK_TOKENS,
        PAGE_BLOCKS,
        AHEAD=AHEAD,
        CAUSAL=CAUSAL,
        HAS_FIRST=HAS_FIRST,
        SOFTCAPPED=SOFTCAPPED,
        COPIED=COPIED,
        WHOLE=WHOLE,
        UPCAST=UPCAST,
        PRECISION=PRECISION,
    )
    own_rows_M = tokens_M.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads_M
    factor_M = tl.full([BLOCK_M], 1.0, tl.float32)
    if SINKS:
        sink2_M = tl.load(sinks_ptr + heads_M, mask=row_mask_M, other=float("-inf")) * LOG2_E
        max2_M, factor_M, share_M = _meet(max2_M, sink2_M)
        sum_M = sum_M * factor_M + share_M
    if CARRIED:
        carry2_M = tl.load(carry_lse_ptr + own_rows_M, mask=row_mask_M, other=float("-inf"))
        max2_M, decay_M, share_M = _meet(max2_M, carry2_M * LOG2_E)
        sum_M = sum_M * decay_M + share_M
        factor_M *= decay_M
    seen_M = sum_M > 0.0
    divisor_M = tl.where(seen_M, sum_M, 1.0)
    out_MD = acc_MD * (factor_M / divisor_M)[:, None]
    mask_MD = row_mask_M[:, None] & (offs_v_D < VALUE_DIM)[None, :]
    if CARRIED:
        carry_rows_M = carry_out_ptr + own_rows_M * VALUE_DIM
        carry_MD = tl.load(carry_rows_M[:, None] + offs_v_D[None, :], mask=mask_MD, other=0.0)
        out_MD += carry_MD * (share_M / divisor_M)[:, None]
    own_rows_M += part.to(tl.int64) * num_tokens * (NUM_KV_HEADS * GROUP)
    tl.store(
        (out_ptr + own_rows_M * VALUE_DIM)[:, None] + offs_v_D[None, :],
        out_MD.to(out_ptr.dtype.element_ty),
        mask=mask_MD,
    )
    lse_M = tl.where(seen_M, (max2_M + tl.log2(divisor_M)) * _LN_2, float("-inf"))
    tl.store(lse_ptr + own_rows_M, lse_M, mask=row_mask_M)
