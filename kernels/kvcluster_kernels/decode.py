"""Decode over an exact paged cache: a few query tokens of each row, split over the keys.

The query heads that share a KV head, for all query tokens, are the rows of one matrix product, so
that each key is read once (FlashDecoding, with grouped heads packed). Float32 products are done in
float32. `decode_plain.decode` is the definition.

Shape letters: those of `paging.py`; N keys of a tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.combine import combine
from kvcluster_kernels.paging import (
    ROW_NUMBERS,
    ROW_POINTERS,
    Attention,
    DecodeSettings,
    PagedRows,
    Partial,
    SplitPartials,
    block_offset,
    blocks_of_tile,
    check_contiguous,
    check_positions,
    is_interpreted,
    let_next_start,
    load_queries,
    overlaps,
    split_tiles,
    wait_for_earlier,
)
from kvcluster_kernels.softmax import (
    online,
    store_split,
    to_base_2,
    visible_at,
)

MAX_TILE_ROWS = 128


class ExactPages(NamedTuple):
    """Pages of exact keys and values of one layer, as the cache has them."""

    k_PKND: Tensor
    v_PKND: Tensor
    """May be a view of the first numbers of the keys."""
    block_size: int
    """Tokens of a block. Block b is the b % n-th of page b // n, n blocks to a page."""


def decode(
    q_RTHD: Tensor,
    pages: ExactPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> Partial:
    """Attention of each row's query tokens over its tokens in the cache. Any row may have none.

    Raises: ValueError for arrays that do not go together.
    """
    splits = decode_splits(q_RTHD, pages, rows, attention, settings)
    return combine(splits, num_tokens=q_RTHD.shape[1])


def decode_splits(
    q_RTHD: Tensor,
    pages: ExactPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> SplitPartials:
    """The same before it is merged, to be merged with more."""
    k_PKND, v_PKND, block_size = pages
    check_positions(rows, attention)
    check_contiguous(q_RTHD=q_RTHD, **rows._asdict())
    (num_rows, num_tokens, num_heads, dim_k), early = q_RTHD.shape, overlaps(q_RTHD.device)
    num_kv_heads, page_tokens, dim_v = v_PKND.shape[1:]
    if k_PKND.shape[1:] != (num_kv_heads, page_tokens, dim_k) or num_heads % num_kv_heads:
        raise ValueError(
            f"queries {tuple(q_RTHD.shape)}, keys {tuple(k_PKND.shape)} and values "
            f"{tuple(v_PKND.shape)} do not go together"
        )
    if q_RTHD.dtype != k_PKND.dtype:
        raise ValueError(f"queries are {q_RTHD.dtype}, keys are {k_PKND.dtype}")
    group = num_heads // num_kv_heads
    settings = settings or default_settings(num_tokens * group, max(dim_k, dim_v))
    block_m = min(MAX_TILE_ROWS, max(16, triton.next_power_of_2(num_tokens * group)))
    row_tiles = triton.cdiv(num_tokens * group, block_m)
    num_splits = settings.splits(
        q_RTHD.device,
        num_programs=num_rows * num_kv_heads * row_tiles,
        num_tiles=triton.cdiv(rows.blocks_RB.shape[1] * block_size, settings.tile),
    )
    found = SplitPartials.empty(q_RTHD, num_kv_heads=num_kv_heads, num_splits=num_splits, dim=dim_v)
    has_positions = rows.q_positions_RT is not None
    _decode_kernel[(num_splits * row_tiles, num_kv_heads, num_rows)](
        q_RTHD,
        k_PKND,
        v_PKND,
        rows.blocks_RB,
        rows.starts_R,
        rows.ends_R,
        rows.block_positions_RB if has_positions else rows.blocks_RB,
        rows.q_positions_RT if has_positions else rows.blocks_RB,
        found.out_RKXMD,
        found.lse_RKXM,
        attention.scale,
        attention.softcap or 0.0,
        attention.window or 0,
        rows.blocks_RB.shape[1],
        num_splits,
        *_strides(k_PKND, block_size),
        *_strides(v_PKND, block_size),
        NUM_ROWS=num_tokens * group,
        GROUP=group,
        BLOCK_SIZE=block_size,
        PAGE_BLOCKS=page_tokens // block_size,
        DIM_K=dim_k,
        DIM_V=dim_v,
        BLOCK_M=block_m,
        TILE=settings.tile,
        HAS_POSITIONS=has_positions,
        HAS_SOFTCAP=attention.softcap is not None,
        HAS_WINDOW=attention.window is not None,
        OVERLAPS=early,
        UPCAST=is_interpreted(_decode_kernel),
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        launch_pdl=early,
    )
    return found


def default_settings(num_rows: int, dim: int) -> DecodeSettings:
    """The settings for so many query rows of a KV head and heads of so many channels.

    128 channels: the best of `kernels_decode_h100_2026-11-23.json` and of runs before it, which
    differ by less than 3 %. Others follow from what was compiled: nothing spilled, and as many
    programs as a processor holds at a time, because those beyond would run on their own at the end.
    """
    if num_rows > 64:
        return DecodeSettings(tile=64 if dim <= 128 else 32, num_warps=8, programs_per_processor=1)
    if num_rows > 32:
        if dim > 128:
            return DecodeSettings(tile=32, num_stages=4, programs_per_processor=2)
        if dim > 64:
            return DecodeSettings(num_stages=6, programs_per_processor=1)
        return DecodeSettings(num_stages=3, programs_per_processor=3)
    if dim > 128:
        return DecodeSettings(tile=32)
    return DecodeSettings(programs_per_processor=2 if dim > 64 else 4)


def _strides(x_PKND: Tensor, block_size: int) -> tuple[int, int, int, int]:
    """Of pages, blocks, heads and tokens."""
    page, head, token, channel = x_PKND.stride()
    if channel != 1:
        raise ValueError("the channels of a token must lie together")
    return page, token * block_size, head, token


@triton.jit(do_not_specialize=ROW_NUMBERS, do_not_specialize_on_alignment=ROW_POINTERS)
def _decode_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
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
    stride_k_page: tl.tensor,
    stride_k_block: tl.tensor,
    stride_k_head: tl.tensor,
    stride_k_token: tl.tensor,
    stride_v_page: tl.tensor,
    stride_v_block: tl.tensor,
    stride_v_head: tl.tensor,
    stride_v_token: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    BLOCK_DK: tl.constexpr = triton.next_power_of_2(DIM_K)
    BLOCK_DV: tl.constexpr = triton.next_power_of_2(DIM_V)
    ROW_TILES: tl.constexpr = triton.cdiv(NUM_ROWS, BLOCK_M)
    wait_for_earlier(OVERLAPS)
    # A kernel that begins now finds what this one found (`begins_early` of packed kernels).
    let_next_start(OVERLAPS)
    # Programs of one split side by side, so that the keys of the second come from L2.
    split = tl.program_id(0) // ROW_TILES
    rows_M = tl.program_id(0) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, TILE)
    q_MD = load_queries(q_ptr, row, head, num_kv_heads, rows_M, NUM_ROWS, GROUP, DIM_K, BLOCK_DK)
    q_positions_M = rows_M
    if HAS_POSITIONS:
        q_positions_ptr += row * (NUM_ROWS // GROUP)
        q_positions_M = tl.load(q_positions_ptr + rows_M // GROUP, mask=rows_M < NUM_ROWS, other=0)
    blocks_ptr += row.to(tl.int64) * max_blocks
    block_positions_ptr += row.to(tl.int64) * max_blocks
    k_ptr += head * stride_k_head
    v_ptr += head * stride_v_head

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for tile in tl.range(begin, stop):
        tokens_N = tile * TILE + tl.arange(0, TILE)
        places_N = tokens_N % BLOCK_SIZE
        inside_N = (tokens_N >= start) & (tokens_N < end)
        blocks = blocks_of_tile(blocks_ptr, tile * TILE, end, BLOCK_SIZE, TILE)
        k_block = block_offset(blocks, stride_k_page, stride_k_block, PAGE_BLOCKS)
        v_block = block_offset(blocks, stride_v_page, stride_v_block, PAGE_BLOCKS)
        k_ND = _load_tokens(k_ptr, k_block + places_N * stride_k_token, inside_N, DIM_K, BLOCK_DK)
        v_ND = _load_tokens(v_ptr, v_block + places_N * stride_v_token, inside_N, DIM_V, BLOCK_DV)
        if UPCAST:
            q_MD = q_MD.to(tl.float32)
            k_ND = k_ND.to(tl.float32)
            v_ND = v_ND.to(tl.float32)
        products_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        # Added to what is multiplied anyway, a mask costs one instruction a key, not one a score.
        mask_N = tl.where(inside_N, 0.0, -float("inf"))
        scores_MN = to_base_2(products_MN, scale, softcap, HAS_SOFTCAP) + mask_N[None, :]
        if HAS_POSITIONS:
            positions = blocks_of_tile(block_positions_ptr, tile * TILE, end, BLOCK_SIZE, TILE)
            distance_MN = q_positions_M[:, None] - (positions + places_N)[None, :]
            scores_MN = visible_at(scores_MN, distance_MN, window, HAS_WINDOW)
        weights_MN, max_M, sum_M, decay_M = online(scores_MN, max_M, sum_M)
        weights_MN = weights_MN.to(v_ND.dtype)
        acc_MD = tl.dot(weights_MN, v_ND, acc_MD * decay_M[:, None], input_precision="ieee")
    place = ((row * num_kv_heads + head) * num_splits + split) * NUM_ROWS
    store_split(out_ptr, lse_ptr, acc_MD, max_M, sum_M, place, rows_M, NUM_ROWS, DIM_V, BLOCK_DV)


@triton.jit
def _load_tokens(
    x_ptr: tl.tensor,
    offs_N: tl.tensor,
    inside_N: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    offs_d = tl.arange(0, BLOCK_D)
    mask_ND = inside_N[:, None] & (offs_d < DIM)[None, :]
    return tl.load(x_ptr + offs_N[:, None] + offs_d[None, :], mask=mask_ND, other=0.0)
