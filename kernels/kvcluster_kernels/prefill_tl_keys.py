"""The walk over keys of the portable prefill kernel.

There is one loop, with and without a mask, because the assembler waits for each of the products of
a kernel whose sums run on from one loop into another one. A row that is not there is read from
where the last key lies. Where registers allow it, logits of the next keys are asked for before the
softmax of the present ones, which then runs beside the matrix unit.

Shape letters: those of `prefill_tl_kernel.py`; N keys of a step.
"""

import triton
import triton.language as tl


@triton.jit
def _key_rows(
    ptr,
    first,
    offs_N,
    blocks_ptr,
    num_keys,
    stride_p,
    stride_s,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pointers to the rows of keys first .. first + BLOCK_N; behind the last key, to that one."""
    offs_N = tl.minimum(offs_N, num_keys - 1 - first)
    # One way out: what is behind a return is compiled as well, whatever the constants are.
    if BLOCK_TOKENS == 0:
        rows_N = ptr + tl.cast(first, tl.int64) * stride_s + offs_N * stride_s
    elif BLOCK_TOKENS % BLOCK_N == 0:
        block = tl.load(blocks_ptr + first // BLOCK_TOKENS).to(tl.int64)
        slot = (block % PAGE_BLOCKS) * BLOCK_TOKENS + first % BLOCK_TOKENS
        rows_N = ptr + (block // PAGE_BLOCKS) * stride_p + slot * stride_s + offs_N * stride_s
    else:
        keys_N = first + offs_N
        blocks_N = tl.load(blocks_ptr + keys_N // BLOCK_TOKENS)
        slots_N = (blocks_N % PAGE_BLOCKS) * BLOCK_TOKENS + keys_N % BLOCK_TOKENS
        rows_N = ptr + (blocks_N // PAGE_BLOCKS).to(tl.int64) * stride_p + slots_N * stride_s
    return rows_N


@triton.jit
def load_rows(rows_N, offs_D, mask_N, DIM: tl.constexpr, MASKED: tl.constexpr):
    ptrs_ND = rows_N[:, None] + offs_D[None, :]
    if MASKED:
        x_ND = tl.load(ptrs_ND, mask=mask_N[:, None] & (offs_D < DIM)[None, :], other=0.0)
    elif offs_D.shape[0] != DIM:
        x_ND = tl.load(ptrs_ND, mask=(offs_D < DIM)[None, :], other=0.0)
    else:
        x_ND = tl.load(ptrs_ND)
    return x_ND


@triton.jit
def _key_logits(
    q_MD,
    k_ptr,
    first,
    blocks_ptr,
    num_keys,
    stride_p,
    stride_s,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIED: tl.constexpr,
):
    """Products of these rows and keys first .. first + BLOCK_N."""
    if COPIED:
        k_ND = k_ptr.load([stride_p, first, 0]).reshape(BLOCK_N, PADDED_DIM)
    else:
        rows_N = _key_rows(
            k_ptr,
            first,
            tl.arange(0, BLOCK_N),
            blocks_ptr,
            num_keys,
            stride_p,
            stride_s,
            BLOCK_TOKENS,
            PAGE_BLOCKS,
            BLOCK_N,
        )
        k_ND = load_rows(rows_N, tl.arange(0, PADDED_DIM), None, DIM, MASKED=False)
    if UPCAST:
        k_ND = k_ND.to(tl.float32)
    return tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)


@triton.jit
def _ruled(
    logits_MN,
    keys_N,
    is_masked,
    seen_first_M,
    seen_last_M,
    num_keys,
    scale2,
    softcap2,
    CAUSAL: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
):
    """Logits of these keys by the rules, -inf where a row does not see the key, and what they are
    still to be multiplied with."""
    factor = scale2
    if SOFTCAPPED:
        # tanh by exp2, which is there on every target.
        logits_MN = 1.0 - 2.0 / (1.0 + tl.exp2(logits_MN * scale2))
        factor = softcap2
    if is_masked:
        mask_MN = (keys_N < num_keys)[None, :]
        if CAUSAL:
            mask_MN = mask_MN & (keys_N[None, :] <= seen_last_M[:, None])
        if HAS_FIRST:
            mask_MN = mask_MN & (keys_N[None, :] >= seen_first_M[:, None])
        logits_MN = tl.where(mask_MN, logits_MN, float("-inf"))
    return logits_MN, factor


@triton.jit
def fold_keys(
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
    first,
    plain,
    last,
    num_keys,
    scale2,
    softcap2,
    BLOCK_N: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    COPIED: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax of these rows over keys first .. last, a multiple of BLOCK_N on. Those
    below `plain` are seen by all rows."""
    offs_N = tl.arange(0, BLOCK_N)
    offs_v_D = tl.arange(0, PADDED_VALUE_DIM)
    if AHEAD:
        next_MN = tl.zeros([q_MD.shape[0], BLOCK_N], tl.float32)
        if first < last:
            next_MN = _key_logits(
                q_MD,
                k_ptr,
                first,
                blocks_ptr,
                num_keys,
                stride_k_p,
                stride_k_s,
                BLOCK_N,
                KEY_DIM,
                PADDED_KEY_DIM,
                BLOCK_TOKENS,
                PAGE_BLOCKS,
                UPCAST,
                PRECISION,
                COPIED,
            )
    for tile in tl.range(first, last, BLOCK_N):
        asked = tile
        if AHEAD:
            # Behind the last keys, those once more.
            asked = tl.minimum(tile + BLOCK_N, (num_keys - 1) // BLOCK_N * BLOCK_N)
        asked_MN = _key_logits(
            q_MD,
            k_ptr,
            asked,
            blocks_ptr,
            num_keys,
            stride_k_p,
            stride_k_s,
            BLOCK_N,
            KEY_DIM,
            PADDED_KEY_DIM,
            BLOCK_TOKENS,
            PAGE_BLOCKS,
            UPCAST,
            PRECISION,
            COPIED,
        )
        if AHEAD:
            logits_MN = next_MN
            next_MN = asked_MN
        else:
            logits_MN = asked_MN
        logits_MN, factor = _ruled(
            logits_MN,
            tile + offs_N,
            False if WHOLE else tile >= plain,
            seen_first_M,
            seen_last_M,
            num_keys,
            scale2,
            softcap2,
            CAUSAL,
            HAS_FIRST,
            SOFTCAPPED,
        )
        new_max2_M = tl.maximum(max2_M, tl.max(logits_MN, 1) * factor)
        shift_M = new_max2_M
        if CAUSAL:
            # A row that has seen no key: -inf minus -inf is NaN.
            shift_M = tl.where(new_max2_M == float("-inf"), 0.0, new_max2_M)
        weights_MN = tl.exp2(logits_MN * factor - shift_M[:, None])
        decay_M = tl.exp2(max2_M - shift_M)
        sum_M = sum_M * decay_M + tl.sum(weights_MN, 1)
        max2_M = new_max2_M
        if COPIED:
            v_ND = v_ptr.load([stride_v_p, tile, 0]).reshape(BLOCK_N, PADDED_VALUE_DIM)
        else:
            v_rows_N = _key_rows(
                v_ptr,
                tile,
                offs_N,
                blocks_ptr,
                num_keys,
                stride_v_p,
                stride_v_s,
                BLOCK_TOKENS,
                PAGE_BLOCKS,
                BLOCK_N,
            )
            v_ND = load_rows(v_rows_N, offs_v_D, None, VALUE_DIM, MASKED=False)
        if UPCAST:
            v_ND = v_ND.to(tl.float32)
        acc_MD = acc_MD * decay_M[:, None]
        acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision=PRECISION)
    return acc_MD, max2_M, sum_M
