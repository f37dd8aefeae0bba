"""Prefill attention over chosen blocks: each tile of query tokens has lists of the blocks of the
sequence that it reads, one for all heads, for each KV head, or for each query head.

Where query heads of a KV head share a list, its keys are read once for them. Decode over chosen
blocks needs no kernel of its own: a list is a block table (`block_lists.py`).

Shape letters: T query tokens, S keys, H query heads, K KV heads, G heads that have lists, D head
dimension, U tiles of queries, L blocks of a list.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.paging import is_interpreted
from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention, check_arguments
from kvcluster_kernels.softmax import online, to_base_2, visible_at

_LN_2 = tl.constexpr(math.log(2))


class TileBlocks(NamedTuple):
    """The blocks that each tile of queries reads. int32, contiguous, on the device of the keys."""

    blocks_GUL: Tensor
    """Numbers of blocks in the sequence, each once, in any order; what lies behind a list's end is
    not read. G is 1, K or H."""
    counts_GU: Tensor
    tile_tokens: int
    """Query tokens of a tile."""
    block_tokens: int
    """Keys of a block; of a paged cache, as there. A power of two, 16 or more."""


class SparseTiles(NamedTuple):
    """How a call is launched. Changes the speed alone."""

    block_m: int
    """Rows of a program; those of a tile are worked on in as many parts as it takes."""
    num_stages: int
    """Steps under way: of a block, its number comes first, then its place, then its keys."""
    is_ahead: bool = False
    """Products of the next block are asked for before the softmax of the present one."""


def sparse_prefill(
    q_THD: Tensor,
    keys: Keys,
    chosen: TileBlocks,
    *,
    scale: float,
    causal: Causal | None = None,
    softcap: float | None = None,
    out_dtype: torch.dtype = torch.float32,
    tiles: SparseTiles | None = None,
) -> PartialAttention:
    """As `prefill_tl.prefill` over the keys of a row's list alone. Any list may be empty. `tiles`:
    instead of those that follow from the shapes.

    Raises: ValueError when shapes do not fit.
    """
    check_sparse(q_THD, keys, chosen, scale, causal)
    num_tokens, num_heads, key_dim = q_THD.shape
    num_kv_heads, value_dim = keys.k_PKSD.shape[1], keys.v_PKSD.shape[3]
    found = PartialAttention(
        q_THD.new_empty((num_tokens, num_heads, value_dim), dtype=out_dtype),
        q_THD.new_empty((num_tokens, num_heads), dtype=torch.float32),
    )
    if not num_tokens:
        return found
    groups = _groups(q_THD, keys, chosen)
    tiles = tiles or _tiles(q_THD, keys, chosen.tile_tokens * groups.heads)
    rule = causal or Causal()
    num_tiles = chosen.counts_GU.shape[1]
    num_parts = triton.cdiv(chosen.tile_tokens * groups.heads, tiles.block_m)
    _sparse_kernel[(num_tiles * num_parts, groups.num_groups)](
        q_THD,
        keys.k_PKSD,
        keys.v_PKSD,
        *found,
        keys.block_ids_N,
        chosen.blocks_GUL,
        chosen.counts_GU,
        num_tokens,
        keys.num_keys,
        num_tiles,
        chosen.blocks_GUL.shape[2],
        rule.start,
        num_tokens if rule.split is None else rule.split,
        rule.resume,
        rule.window or 0,
        scale,
        softcap or 0.0,
        *q_THD.stride()[:2],
        *keys.k_PKSD.stride()[:3],
        *keys.v_PKSD.stride()[:3],
        GROUP=groups.heads,
        SHARED_LISTS=groups.num_groups // len(chosen.counts_GU),
        SHARED_KEYS=groups.num_groups // num_kv_heads,
        TILE_TOKENS=chosen.tile_tokens,
        BLOCK_M=tiles.block_m,
        BLOCK_TOKENS=chosen.block_tokens,
        PAGE_BLOCKS=keys.blocks_per_page,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        CAUSAL=causal is not None,
        WINDOWED=rule.window is not None,
        SOFTCAPPED=softcap is not None,
        UPCAST=is_interpreted(_sparse_kernel),
        AHEAD=tiles.is_ahead,
        num_warps=4 if tiles.block_m <= 64 else 8,
        num_stages=tiles.num_stages,
    )
    return found


class _Groups(NamedTuple):
    """Heads whose queries a program works on together: they share a list and keys."""

    num_groups: int
    heads: int
    """Of each."""


def _groups(q_THD: Tensor, keys: Keys, chosen: TileBlocks) -> _Groups:
    num_groups = max(keys.k_PKSD.shape[1], len(chosen.counts_GU))
    return _Groups(num_groups, q_THD.shape[1] // num_groups)


def _tiles(q_THD: Tensor, keys: Keys, num_rows: int) -> SparseTiles:
    """Of tiles of so many rows."""
    is_float32 = q_THD.dtype == torch.float32
    is_wide = max(keys.k_PKSD.shape[3], keys.v_PKSD.shape[3]) > 128
    block_m = max(16, min(64 if is_float32 else 128, triton.next_power_of_2(num_rows)))
    return SparseTiles(block_m, 1 if is_float32 else 2 if is_wide else 4)


def check_sparse(
    q_THD: Tensor, keys: Keys, chosen: TileBlocks, scale: float, causal: Causal | None
) -> None:
    """Raises: ValueError when shapes do not fit, or for a bound that moves with the rows."""
    check_arguments(q_THD, keys, scale, causal, None)
    if causal is not None and causal.bound is not None:
        raise ValueError("chosen blocks: leave out those that are behind a bound")
    size = chosen.block_tokens
    if size < 16 or size & (size - 1) or keys.block_tokens not in (0, size):
        raise ValueError(f"chosen blocks of {size} keys do not fit a cache of {keys.block_tokens}")
    num_tiles = -(-q_THD.shape[0] // chosen.tile_tokens)
    heads = (1, keys.k_PKSD.shape[1], q_THD.shape[1])
    axes = tuple(chosen.counts_GU.shape)
    if axes not in [(count, num_tiles) for count in heads] or chosen.blocks_GUL.shape[:2] != axes:
        raise ValueError(
            f"want lists for 1, {heads[1]} or {heads[2]} heads and {num_tiles} tiles of queries, "
            f"got {axes}"
        )


@triton.jit
def _load_block(
    ptr,
    number,
    block_ids_ptr,
    num_keys,
    stride_p,
    stride_s,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x_ND of the keys of a block, zero behind the last key."""
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(DIM))
    if block_ids_ptr is not None:
        block = tl.load(block_ids_ptr + number)
        slot = block % PAGE_BLOCKS * BLOCK_TOKENS
        ptr += (block // PAGE_BLOCKS).to(tl.int64) * stride_p + slot * stride_s
    else:
        ptr += number.to(tl.int64) * (BLOCK_TOKENS * stride_s)
    offs_N = tl.arange(0, BLOCK_TOKENS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_ND = (number * BLOCK_TOKENS + offs_N < num_keys)[:, None] & (offs_d < DIM)[None, :]
    x_ND = tl.load(ptr + offs_N[:, None] * stride_s + offs_d[None, :], mask=mask_ND, other=0.0)
    if UPCAST:
        x_ND = x_ND.to(tl.float32)
    return x_ND


@triton.jit
def _products(
    q_MD,
    k_ptr,
    number,
    block_ids_ptr,
    num_keys,
    stride_p,
    stride_s,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    k_ND = _load_block(
        k_ptr,
        number,
        block_ids_ptr,
        num_keys,
        stride_p,
        stride_s,
        DIM,
        BLOCK_TOKENS,
        PAGE_BLOCKS,
        UPCAST,
    )
    return tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_keys", "num_tiles", "max_count", "start", "split", "resume", "window",
    ]
)  # fmt: skip
def _sparse_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    block_ids_ptr,
    lists_ptr,
    counts_ptr,
    num_tokens,
    num_keys,
    num_tiles,
    max_count,
    start,
    split,
    resume,
    window,
    scale,
    softcap,
    stride_q_t,
    stride_q_h,
    stride_k_p,
    stride_k_h,
    stride_k_s,
    stride_v_p,
    stride_v_h,
    stride_v_s,
    GROUP: tl.constexpr,
    SHARED_LISTS: tl.constexpr,
    SHARED_KEYS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    AHEAD: tl.constexpr,
):
    BLOCK_DK: tl.constexpr = max(16, triton.next_power_of_2(KEY_DIM))
    BLOCK_DV: tl.constexpr = max(16, triton.next_power_of_2(VALUE_DIM))
    PARTS: tl.constexpr = triton.cdiv(TILE_TOKENS * GROUP, BLOCK_M)
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    own, num_groups = tl.program_id(1), tl.num_programs(1)
    kv_head, list_head = own // SHARED_KEYS, own // SHARED_LISTS
    places_M = part * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens_M = tile * TILE_TOKENS + places_M // GROUP
    heads_M = own * GROUP + places_M % GROUP
    mask_M = (places_M < TILE_TOKENS * GROUP) & (tokens_M < num_tokens)
    offs_d = tl.arange(0, BLOCK_DK)
    q_rows_M = tokens_M.to(tl.int64) * stride_q_t + heads_M * stride_q_h
    mask_MD = mask_M[:, None] & (offs_d < KEY_DIM)[None, :]
    q_MD = tl.load(q_ptr + q_rows_M[:, None] + offs_d[None, :], mask=mask_MD, other=0.0)
    if UPCAST:
        q_MD = q_MD.to(tl.float32)
    positions_M = tl.where(tokens_M < split, tokens_M + start, tokens_M + resume - split)
    k_ptr += kv_head.to(tl.int64) * stride_k_h
    v_ptr += kv_head.to(tl.int64) * stride_v_h
    count = tl.load(counts_ptr + list_head * num_tiles + tile)
    lists_ptr += (list_head * num_tiles + tile).to(tl.int64) * max_count

    # Blocks that end before are seen whole, by all rows.
    plain = num_keys
    if CAUSAL:
        plain = tl.minimum(num_keys, tl.min(positions_M, 0) + 1)

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if AHEAD:
        next_MN = tl.zeros([BLOCK_M, BLOCK_TOKENS], tl.float32)
        if count > 0:
            next_MN = _products(
                q_MD,
                k_ptr,
                tl.load(lists_ptr),
                block_ids_ptr,
                num_keys,
                stride_k_p,
                stride_k_s,
                KEY_DIM,
                BLOCK_TOKENS,
                PAGE_BLOCKS,
                UPCAST,
            )
    # For the mask, a step before: loads that keys wait for are made steps before, this one is not.
    next_number = tl.load(lists_ptr, mask=count > 0, other=0)
    for i in tl.range(0, count):
        masked_number = next_number
        next_number = tl.load(lists_ptr + tl.minimum(i + 1, count - 1))
        asked = i
        if AHEAD:
            # Behind the last block, that once more.
            asked = tl.minimum(i + 1, count - 1)
        asked_MN = _products(
            q_MD,
            k_ptr,
            tl.load(lists_ptr + asked),
            block_ids_ptr,
            num_keys,
            stride_k_p,
            stride_k_s,
            KEY_DIM,
            BLOCK_TOKENS,
            PAGE_BLOCKS,
            UPCAST,
        )
        if AHEAD:
            products_MN = next_MN
            next_MN = asked_MN
        else:
            products_MN = asked_MN
        scores_MN = to_base_2(products_MN, scale, softcap, SOFTCAPPED)
        if WINDOWED or (masked_number + 1) * BLOCK_TOKENS > plain:
            keys_N = masked_number * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
            scores_MN += tl.where(keys_N < num_keys, 0.0, -float("inf"))[None, :]
            if CAUSAL:
                distance_MN = positions_M[:, None] - keys_N[None, :]
                scores_MN = visible_at(scores_MN, distance_MN, window, WINDOWED)
        weights_MN, max_M, sum_M, decay_M = online(scores_MN, max_M, sum_M)
        v_ND = _load_block(
            v_ptr,
            tl.load(lists_ptr + i),
            block_ids_ptr,
            num_keys,
            stride_v_p,
            stride_v_s,
            VALUE_DIM,
            BLOCK_TOKENS,
            PAGE_BLOCKS,
            UPCAST,
        )
        weights_MN = weights_MN.to(v_ND.dtype)
        acc_MD = tl.dot(weights_MN, v_ND, acc_MD * decay_M[:, None], input_precision="ieee")
    safe_sum_M = tl.where(sum_M > 0, sum_M, 1.0)
    own_rows_M = tokens_M.to(tl.int64) * (num_groups * GROUP) + heads_M
    lse_M = (max_M + tl.log2(safe_sum_M)) * _LN_2
    tl.store(lse_ptr + own_rows_M, tl.where(sum_M > 0, lse_M, -float("inf")), mask=mask_M)
    offs_v = tl.arange(0, BLOCK_DV)
    tl.store(
        out_ptr + own_rows_M[:, None] * VALUE_DIM + offs_v[None, :],
        (acc_MD / safe_sum_M[:, None]).to(out_ptr.dtype.element_ty),
        mask=mask_M[:, None] & (offs_v < VALUE_DIM)[None, :],
    )
