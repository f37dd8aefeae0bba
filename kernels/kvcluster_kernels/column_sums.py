"""How much attention each key got, by a second pass over queries whose LSE is known (heavy hitters,
arXiv 2306.14048): sum over query rows of exp(score - lse), for each KV head.

A program owns a tile of keys and walks over the queries that see it, so that nothing is added up
between programs. It takes the products of scores a second time, half of what attention takes.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension, Z splits of the
queries; M query rows of a step, N keys of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.paging import is_interpreted, num_processors
from kvcluster_kernels.prefill_arguments import Causal, Keys, check_arguments

_LOG2_E = math.log2(math.e)
_TILE = 128
_MIN_SPLIT_ROWS = 2048


def column_sums(
    q_THD: Tensor,
    keys: Keys,
    lse_TH: Tensor,
    *,
    scale: float,
    causal: Causal | None = None,
    softcap: float | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """sums_KS, float32. `lse_TH` is over all keys that a row sees, natural logarithm; rows with
    -inf add nothing. `num_splits`: programs that share the queries of a tile of keys; None: as
    many as keep the processor busy.

    Raises: ValueError when shapes do not fit, or for a bound that moves with the rows.
    """
    check_arguments(q_THD, keys, scale, causal, None)
    if causal is not None and causal.bound is not None:
        raise ValueError("column sums: want rows that see all keys up to their own, or a window")
    num_tokens, num_heads, dim = q_THD.shape
    num_kv_heads = keys.k_PKSD.shape[1]
    if lse_TH.shape != (num_tokens, num_heads):
        raise ValueError(
            f"column sums: LSE of shape {tuple(lse_TH.shape)} for {tuple(q_THD.shape)}"
        )
    is_float32 = q_THD.dtype == torch.float32
    block_m, block_n = (32, 32) if is_float32 else (64 if dim > 128 else 128, _TILE)
    num_tiles = triton.cdiv(keys.num_keys, block_n)
    num_rows = num_tokens * (num_heads // num_kv_heads)
    if num_splits is None:
        busy = num_processors(q_THD.device) * 2 // max(1, num_tiles * num_kv_heads)
        num_splits = max(1, min(busy, num_rows // _MIN_SPLIT_ROWS))
    sums_ZKS = q_THD.new_zeros((num_splits, num_kv_heads, keys.num_keys), dtype=torch.float32)
    if sums_ZKS.numel() and num_tokens:
        rule = causal or Causal()
        scale2 = scale * _LOG2_E
        _column_sums_kernel[(num_tiles, num_kv_heads, num_splits)](
            q_THD,
            keys.k_PKSD,
            _by_rows(lse_TH, num_kv_heads),
            sums_ZKS,
            keys.block_ids_N,
            num_tokens,
            keys.num_keys,
            rule.start,
            num_tokens if rule.split is None else rule.split,
            rule.resume,
            rule.window or 0,
            2.0 * scale2 / softcap if softcap is not None else scale2,
            softcap * _LOG2_E if softcap is not None else 1.0,
            *q_THD.stride()[:2],
            *keys.k_PKSD.stride()[:3],
            GROUP=num_heads // num_kv_heads,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            DIM=dim,
            BLOCK_TOKENS=0 if keys.block_ids_N is None else keys.block_tokens,
            PAGE_BLOCKS=keys.blocks_per_page,
            CAUSAL=causal is not None,
            WINDOWED=rule.window is not None,
            SOFTCAPPED=softcap is not None,
            UPCAST=is_interpreted(_column_sums_kernel),
            num_warps=4 if is_float32 else 8,
            num_stages=1 if is_float32 else 3,
        )
    return sums_ZKS.sum(0)


def _by_rows(lse_TH: Tensor, num_kv_heads: int) -> Tensor:
    """To base 2, the query rows of a KV head one after another; those that saw no key have +inf,
    beside which every score counts nothing."""
    lse2_TH: Tensor = torch.where(lse_TH == -math.inf, math.inf, lse_TH.float() * _LOG2_E)
    by_head_TKG = lse2_TH.view(len(lse_TH), num_kv_heads, -1)
    return by_head_TKG.transpose(0, 1).contiguous()


@triton.jit
def _first_row(position, num_tokens, start, split, resume):
    """The first query token that is at the position or behind it."""
    first = tl.maximum(position - start, 0)
    second = tl.maximum(position - resume, 0) + split
    return tl.minimum(tl.where(first < split, first, second), num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "num_keys", "start", "split", "resume", "window"])
def _column_sums_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    sums_ptr,
    blocks_ptr,
    num_tokens,
    num_keys,
    start,
    split,
    resume,
    window,
    scale2,
    softcap2,
    stride_q_t,
    stride_q_h,
    stride_k_p,
    stride_k_h,
    stride_k_s,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(DIM))
    first_key = tl.program_id(0) * BLOCK_N
    head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    part, num_parts = tl.program_id(2), tl.num_programs(2)
    keys_N = first_key + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    inside_N = keys_N < num_keys
    if BLOCK_TOKENS > 0:
        blocks_N = tl.load(blocks_ptr + keys_N // BLOCK_TOKENS, mask=inside_N, other=0)
        slots_N = blocks_N % PAGE_BLOCKS * BLOCK_TOKENS + keys_N % BLOCK_TOKENS
        k_rows_N = (blocks_N // PAGE_BLOCKS).to(tl.int64) * stride_k_p + slots_N * stride_k_s
    else:
        k_rows_N = keys_N.to(tl.int64) * stride_k_s
    k_ptr += head.to(tl.int64) * stride_k_h
    lse_ptr += head.to(tl.int64) * (num_tokens * GROUP)
    mask_ND = inside_N[:, None] & (offs_d < DIM)[None, :]
    k_ND = tl.load(k_ptr + k_rows_N[:, None] + offs_d[None, :], mask=mask_ND, other=0.0)
    if UPCAST:
        k_ND = k_ND.to(tl.float32)

    begin = 0
    end = num_tokens
    if CAUSAL:
        begin = _first_row(first_key, num_tokens, start, split, resume)
        if WINDOWED:
            end = _first_row(first_key + BLOCK_N - 1 + window, num_tokens, start, split, resume)
    begin = begin * GROUP // BLOCK_M
    end = tl.cdiv(end * GROUP, BLOCK_M)
    share = tl.cdiv(tl.maximum(end - begin, 0), num_parts)
    begin += part * share
    end = tl.minimum(end, begin + share)
    sums_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in tl.range(begin, end):
        rows_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        tokens_M = rows_M // GROUP
        heads_M = head * GROUP + rows_M % GROUP
        mask_M = tokens_M < num_tokens
        q_rows_M = tokens_M.to(tl.int64) * stride_q_t + heads_M * stride_q_h
        mask_MD = mask_M[:, None] & (offs_d < DIM)[None, :]
        q_MD = tl.load(q_ptr + q_rows_M[:, None] + offs_d[None, :], mask=mask_MD, other=0.0)
        if UPCAST:
            q_MD = q_MD.to(tl.float32)
        lse2_M = tl.load(lse_ptr + rows_M, mask=mask_M, other=float("inf"))
        scores_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee")
        if SOFTCAPPED:
            scores_NM = softcap2 * (1.0 - 2.0 / (1.0 + tl.exp2(scores_NM * scale2)))
        else:
            scores_NM = scores_NM * scale2
        weights_NM = tl.exp2(scores_NM - lse2_M[None, :])
        if CAUSAL:
            positions_M = tl.where(tokens_M < split, tokens_M + start, tokens_M + resume - split)
            distance_NM = positions_M[None, :] - keys_N[:, None]
            visible_NM = distance_NM >= 0
            if WINDOWED:
                visible_NM = visible_NM & (distance_NM < window)
            weights_NM = tl.where(visible_NM, weights_NM, 0.0)
        sums_NM += weights_NM
    sums_ptr += (part * num_kv_heads + head).to(tl.int64) * num_keys
    tl.store(sums_ptr + keys_N, tl.sum(sums_NM, 1), mask=inside_N)
