"""Which blocks queries read: the best of those that they may, as a mask or as lists of blocks.

Blocks differ in what they are to a query (`FREE` and so on), and queries choose for themselves,
head by head. Nothing here asks the host how many blocks were chosen.

Shape letters: J queries, G heads that choose, B blocks of a sequence, K KV heads.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.paging import PagedRows

FREE: Final = 1
"""Read if it is among the best."""
ALWAYS: Final = 2
"""Read whatever it is worth."""
EXACT: Final = 4
"""Here, and read as it was written."""
ENCODED: Final = 8
"""Here, and read as a codec wrote it."""
MAX_BLOCKS: Final = 1 << 16
"""A program looks at all blocks of a sequence."""


_PIECE: Final = 2048
"""Blocks that are listed at a time."""


class Candidates(NamedTuple):
    """What the blocks of a sequence are to queries."""

    flags_JB: Tensor
    """uint8, sums of the numbers above."""
    num_J: Tensor | None = None
    """int32: how many of the free blocks are read, or all if there are fewer; without it, those are
    known already."""


class Pools(NamedTuple):
    """Where the blocks of a sequence lie, for decode."""

    exact_ids_B: Tensor
    """int32; of blocks that are not here, any number. [J, B] where each query is of a sequence of
    its own."""
    encoded_ids_B: Tensor | None
    """Likewise; None: there are none."""
    page_blocks: int
    """Exact blocks of a page."""
    block_size: int
    exact_heads: int = 1
    """KV heads of a page, where each has blocks of its own (`block_lists.one_head_pages`); 1 where
    heads read together."""
    encoded_heads: int = 1
    """Likewise (`block_lists.one_head_planes`)."""


class BlockLists(NamedTuple):
    """Lists of blocks, ascending."""

    blocks_GJB: Tensor
    """int32; what lies behind a list's end was not written."""
    counts_GJ: Tensor


def pick(score_GJS: Tensor, candidates: Candidates) -> Tensor:
    """reads_GJB, bool: the best of the free blocks, ties to the lower one, and those that are
    always read. Scores are of the first S blocks, float32; others are not free.
    `chosen_blocks_plain.pick` is the definition. On a CPU in Triton's interpreter.

    Raises: ValueError for arrays that do not go together, or more than `MAX_BLOCKS` blocks.
    """
    assert candidates.num_J is not None, "picks want numbers of blocks"
    shape = (len(score_GJS), *candidates.flags_JB.shape)
    reads_GJB = torch.empty(shape, dtype=torch.bool, device=score_GJS.device)
    _launch(score_GJS, candidates, _Written(reads_GJB=reads_GJB.view(torch.uint8)))
    return reads_GJB


def lists(reads_GJB: Tensor, flags_JB: Tensor, flag: int) -> BlockLists:
    """The numbers of the blocks that are read and have this flag.

    Raises: as `pick`.
    """
    blocks_GJB = torch.empty(reads_GJB.shape, dtype=torch.int32, device=reads_GJB.device)
    found = BlockLists(blocks_GJB, blocks_GJB.new_empty(reads_GJB.shape[:2]))
    _launch(reads_GJB, Candidates(flags_JB), _Written(flag, *found))
    return found


def row_tables(
    worth_GJB: Tensor, candidates: Candidates, left_J: Tensor, pools: Pools
) -> tuple[PagedRows, PagedRows | None]:
    """What rows read of the exact pool and of the encoded one: a row for each query and head that
    chooses, J * G of them. `worth_GJB`: scores as `pick` takes them or, without numbers to pick,
    what `pick` gave.

    `left_J`, int32: how many tokens of the last exact block are not read. Encoded rows have the
    positions of their blocks, whose tokens follow one another.

    Raises: as `pick`.
    """
    num_rows = candidates.flags_JB.shape[0] * len(worth_GJB)
    shape = (num_rows, candidates.flags_JB.shape[1])
    # All in one piece: numbers that are written, and the starts, which are zero.
    numbers = torch.zeros(3, num_rows, dtype=torch.int32, device=worth_GJB.device)
    exact = PagedRows(numbers.new_empty(shape), numbers[0], numbers[1])
    encoded = None
    if pools.encoded_ids_B is not None:
        blocks_XB, positions_XB = numbers.new_empty((2, *shape))
        encoded = PagedRows(blocks_XB, numbers[0], numbers[2], positions_XB)
    written = _Written(EXACT, exact.blocks_RB, exact.ends_R, encoded=encoded)
    _launch(worth_GJB, candidates, written, left_J, pools)
    return exact, encoded


class _Written(NamedTuple):
    """What programs write."""

    flag: int = 0
    """Of the blocks of the first list; 0: there is none."""
    blocks: Tensor | None = None
    ends: Tensor | None = None
    encoded: PagedRows | None = None
    reads_GJB: Tensor | None = None


def _launch(
    worth_GJS: Tensor,
    candidates: Candidates,
    written: _Written,
    left_J: Tensor | None = None,
    pools: Pools | None = None,
) -> None:
    flags_JB, num_J = candidates
    num_queries, num_blocks = flags_JB.shape
    num_choosing, num_scores, num_scored = worth_GJS.shape
    if num_blocks > MAX_BLOCKS:
        raise ValueError(f"blocks: {num_blocks} are more than a program looks at")
    if num_scores != num_queries or num_scored > num_blocks:
        raise ValueError(f"blocks: worth {tuple(worth_GJS.shape)}, flags {tuple(flags_JB.shape)}")
    if not flags_JB.numel() or not num_choosing:
        return
    encoded = written.encoded
    block_b = max(128, triton.next_power_of_2(num_blocks))
    _choose_kernel[(num_queries, num_choosing)](
        worth_GJS.contiguous().view(
            torch.uint8 if worth_GJS.dtype == torch.bool else torch.float32
        ),
        flags_JB,
        num_J,
        left_J,
        written.reads_GJB,
        pools and pools.exact_ids_B,
        pools and pools.encoded_ids_B,
        written.blocks,
        written.ends,
        encoded and encoded.blocks_RB,
        encoded and encoded.ends_R,
        encoded and encoded.block_positions_RB,
        num_blocks,
        num_scored,
        pools.exact_ids_B.stride(0) if pools and pools.exact_ids_B.ndim > 1 else 0,
        PICKS=num_J is not None,
        LISTED=written.flag,
        HAS_ENCODED=encoded is not None,
        ARE_ROWS=pools is not None,
        EXACT_HEADS=pools.exact_heads if pools else 1,
        ENCODED_HEADS=pools.encoded_heads if pools else 1,
        PAGE_BLOCKS=pools.page_blocks if pools else 1,
        BLOCK_TOKENS=pools.block_size if pools else 1,
        BLOCK_B=block_b,
        PIECE=min(block_b, _PIECE),
        num_warps=min(16, max(4, block_b // 256)),
    )


@triton.jit
def _order(score_B, is_free_B):
    """Integers in the order of the scores; those of blocks that are not free come first."""
    # -0.0 and 0.0 tie. Then the order of the bits, as integers, is that of the scores.
    bits_B = tl.where(score_B == 0.0, 0.0, score_B).to(tl.int32, bitcast=True)
    return tl.where(is_free_B, bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _threshold(order_B, number):
    """The largest integer that `number` of these are not below, bit by bit, and how many of those
    that are equal to it belong to the first `number`."""
    num_positive = tl.sum((order_B >= 0).to(tl.int32), 0)
    threshold = tl.where(num_positive >= number, 0, -0x80000000)
    for place in tl.range(0, 31):
        higher = threshold + (1 << (30 - place))
        num_above = tl.sum((order_B >= higher).to(tl.int32), 0)
        threshold = tl.where(num_above >= number, higher, threshold)
    return threshold, number - tl.sum((order_B > threshold).to(tl.int32), 0)


@triton.jit
def _append(is_listed_B, ids_B, positions_B, blocks_ptr, positions_ptr, count):
    """Write what is listed behind `count` others; how many there are then."""
    places_B = count + tl.cumsum(is_listed_B.to(tl.int32), 0) - 1
    tl.store(blocks_ptr + places_B, ids_B, mask=is_listed_B)
    if positions_ptr is not None:
        tl.store(positions_ptr + places_B, positions_B, mask=is_listed_B)
    return count + tl.sum(is_listed_B.to(tl.int32), 0)


@triton.jit(do_not_specialize=["num_blocks", "num_scored", "stride_ids"])
def _choose_kernel(
    worth_ptr,
    flags_ptr,
    num_ptr,
    left_ptr,
    reads_ptr,
    exact_ids_ptr,
    encoded_ids_ptr,
    blocks_ptr,
    ends_ptr,
    encoded_ptr,
    encoded_ends_ptr,
    positions_ptr,
    num_blocks,
    num_scored,
    stride_ids,
    PICKS: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_ENCODED: tl.constexpr,
    ARE_ROWS: tl.constexpr,
    EXACT_HEADS: tl.constexpr,
    ENCODED_HEADS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PIECE: tl.constexpr,
):
    query, num_queries = tl.program_id(0), tl.num_programs(0)
    choosing, num_choosing = tl.program_id(1), tl.num_programs(1)
    own = choosing * num_queries + query
    # Rows of a query lie together, lists of a head.
    place = query * num_choosing + choosing if ARE_ROWS else own
    flags_ptr += query.to(tl.int64) * num_blocks
    worth_ptr += own.to(tl.int64) * num_scored
    first_place = place.to(tl.int64) * num_blocks
    own_ids = query.to(tl.int64) * stride_ids
    if PICKS:
        all_B = tl.arange(0, BLOCK_B)
        all_flags_B = tl.load(flags_ptr + all_B, mask=all_B < num_scored, other=0)
        all_worth_B = tl.load(worth_ptr + all_B, mask=all_B < num_scored, other=0)
        order_B = _order(all_worth_B, (all_flags_B & 1) != 0)
        threshold, num_ties = _threshold(order_B, tl.load(num_ptr + query))
    num_listed, num_encoded, num_seen = 0, 0, 0
    # A piece at a time: lists of all blocks at once want more registers than there are.
    for first in tl.range(0, num_blocks, PIECE):
        offs_B = first + tl.arange(0, PIECE)
        inside_B = offs_B < num_blocks
        flags_B = tl.load(flags_ptr + offs_B, mask=inside_B, other=0).to(tl.int32)
        worth_B = tl.load(worth_ptr + offs_B, mask=offs_B < num_scored, other=0)
        if PICKS:
            is_free_B = ((flags_B & 1) != 0) & (offs_B < num_scored)
            found_B = _order(worth_B, is_free_B)
            is_tie_B = (found_B == threshold).to(tl.int32)
            is_best_B = (found_B > threshold) | (
                (is_tie_B != 0) & (num_seen + tl.cumsum(is_tie_B, 0) <= num_ties)
            )
            num_seen += tl.sum(is_tie_B, 0)
            is_read_B = (is_free_B & is_best_B) | ((flags_B & 2) != 0)
        else:
            is_read_B = worth_B != 0
        if reads_ptr is not None:
            own_reads_ptr = reads_ptr + own.to(tl.int64) * num_blocks
            tl.store(own_reads_ptr + offs_B, is_read_B.to(tl.uint8), mask=inside_B)
        if LISTED > 0:
            is_listed_B = is_read_B & ((flags_B & LISTED) != 0)
            ids_B = offs_B
            if ARE_ROWS:
                ids_B = tl.load(exact_ids_ptr + own_ids + offs_B, mask=is_listed_B, other=0)
                kv_head = choosing * EXACT_HEADS // num_choosing
                page_B, inside_page_B = ids_B // PAGE_BLOCKS, ids_B % PAGE_BLOCKS
                ids_B = (page_B * EXACT_HEADS + kv_head) * PAGE_BLOCKS + inside_page_B
            num_listed = _append(
                is_listed_B, ids_B, None, blocks_ptr + first_place, None, num_listed
            )
        if HAS_ENCODED:
            is_encoded_B = is_read_B & ((flags_B & 8) != 0)
            encoded_ids_B = tl.load(encoded_ids_ptr + own_ids + offs_B, mask=is_encoded_B, other=0)
            num_encoded = _append(
                is_encoded_B,
                encoded_ids_B * ENCODED_HEADS + choosing * ENCODED_HEADS // num_choosing,
                offs_B * BLOCK_TOKENS,
                encoded_ptr + first_place,
                positions_ptr + first_place,
                num_encoded,
            )
    if LISTED > 0:
        left = tl.load(left_ptr + query) if ARE_ROWS else 0
        tl.store(ends_ptr + place, tl.maximum(num_listed * BLOCK_TOKENS - left, 0))
    if HAS_ENCODED:
        tl.store(encoded_ends_ptr + place, num_encoded * BLOCK_TOKENS)
