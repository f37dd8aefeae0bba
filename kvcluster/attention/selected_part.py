"""A part of a step whose policy selects: which of its rows choose together, which blocks they may
read, where those lie, and what is known of their keys.

Everything but the summaries follows from the plan alone, so all ranks compute the same.

Shape letters: T rows of the part, J query blocks, B blocks, O tokens of a block, K KV heads,
D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcluster.attention.part import SequencePart
from kvcluster.cache.shard import SequenceMap
from kvcluster.cache.store import in_line
from kvcluster.codec.array import consecutive
from kvcluster.selection.base import (
    BlockSelection,
    KeySummaries,
    QueryBlocks,
    query_blocks,
    readable,
    summaries,
)
from kvcluster.types import EXACT


class KeptSummaries(NamedTuple):
    """Summaries of one layer, and the blocks that they are of, ascending."""

    blocks_B: Tensor
    keys: KeySummaries


class Selecting:
    """The selection of one sequence, and what this rank knows of the keys of its blocks here.

    A block is summed up when its last token is written, and never again. What is kept takes, for
    each block and KV head of a layer, 2 D numbers of the keys' dtype (`Need.BOUNDS`) or D float32
    ones (`Need.MEANS`), and for the block an index, beside the pages of the cache.
    """

    def __init__(self, selection: BlockSelection, recent_blocks: int | None) -> None:
        self.selection = selection
        self._recent_blocks = recent_blocks
        self._kept: dict[int, KeptSummaries] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all summaries on this rank."""
        return sum(kept.blocks_B.nbytes + kept.keys.num_bytes for kept in self._kept.values())

    def add(self, layer: int, blocks_B: Tensor, k_BKOD: Tensor) -> None:
        """Sum up whole blocks that come after those of the layer before."""
        needs = self.selection.needs
        kept = KeptSummaries(blocks_B, summaries(in_line(k_BKOD), k_BKOD.shape[2], needs))
        earlier = self._kept.get(layer)
        if earlier is not None:
            kept = KeptSummaries(
                torch.cat((earlier.blocks_B, blocks_B)), earlier.keys.followed_by(kept.keys)
            )
        self._kept[layer] = kept

    def replace(self, layer: int, blocks_B: Tensor, k_KSD: Tensor, block_size: int) -> None:
        """Know these blocks of a layer and no others. Their tokens are in line; the last block may
        be short."""
        self._kept.pop(layer, None)
        if len(blocks_B):
            needs = self.selection.needs
            self._kept[layer] = KeptSummaries(blocks_B, summaries(k_KSD, block_size, needs))

    def forget(self, layer: int, own_block: int) -> None:
        """Drop what no row from this block on may read."""
        kept = self._kept.get(layer)
        if kept is None or self._recent_blocks is None:
            return
        is_readable_B = (kept.blocks_B == 0) | (kept.blocks_B > own_block - self._recent_blocks)
        if not bool(is_readable_B.all()):
            places_B = is_readable_B.nonzero()[:, 0]
            self._kept[layer] = KeptSummaries(kept.blocks_B[places_B], kept.keys.at(places_B))

    def kept(self, layer: int) -> KeptSummaries | None:
        """All that is known of a layer; None: nothing."""
        return self._kept.get(layer)

    def of(self, layer: int, blocks_B: Tensor) -> KeySummaries:
        """Of some blocks here, at least one, ascending."""
        kept = self._kept[layer]
        if len(kept.blocks_B) == len(blocks_B):
            return kept.keys
        return kept.keys.at(torch.searchsorted(kept.blocks_B, blocks_B))


class RankBlocks(NamedTuple):
    """Blocks of this rank that some row of a part may read."""

    blocks_B: Tensor
    exact_ids_B: Tensor
    """Where they are in full precision, as long as they are."""
    encoded_ids_B: Tensor
    """Where those are that some row reads encoded; -1: none does."""


@dataclass(frozen=True)
class Tile:
    """Rows of a part in one block."""

    own: int
    """The block."""
    query_blocks: slice
    rows: slice
    """Of the part."""
    is_near_B: Tensor
    """Earlier blocks of this rank that the rows read as they were written, if they read them."""
    is_far_B: Tensor
    """Likewise as the codec restores them."""


class SelectedPart:
    """One step's part of a sequence that selects. Built once per step and used by every layer."""

    def __init__(
        self,
        part: SequencePart,
        table: SequenceMap,
        selecting: Selecting,
        num_prompt_tokens: int,
        device: torch.device,
    ) -> None:
        self.part = part
        self._device = device
        self.selecting = selecting
        self._table = table
        self._size = table.block_size
        self._num_prompt = num_prompt_tokens
        is_whole = part.start % self._size == 0 or part.start >= num_prompt_tokens
        assert is_whole, "rows of the prompt in one block choose together"
        self._spans = self._readable_spans()
        self._shift = self._index_shift()

    @property
    def is_choosing(self) -> bool:
        """Whether any row may read less than it could: the others go the way of every sequence."""
        selection = self.selecting.selection
        may_choose = selection.chooses_in_prompt or self.part.end > self._num_prompt
        return may_choose and not selection.covers(self.num_blocks)

    @property
    def num_blocks(self) -> int:
        """Of the sequence, up to the end of the part."""
        return -(-self.part.end // self._size) + self._shift

    @cached_property
    def query_blocks(self) -> QueryBlocks:
        positions_T = torch.arange(self.part.start, self.part.end, device=self._device)
        own_T = positions_T // self._size + self._shift
        return query_blocks(own_T, positions_T < self._num_prompt)

    @property
    def num_prompt_rows(self) -> int:
        """Rows of the prompt, which come first; those of a block choose together."""
        return min(self.part.num_tokens, max(0, self._num_prompt - self.part.start))

    def exact_blocks(self) -> Tensor:
        """is_exact_JB: which of all blocks before their own the rows of a query block read as they
        were written, if they read them."""
        own_J = self.query_blocks.own_J
        blocks_B = torch.arange(self.num_blocks, device=self._device)
        if self.part.codec == EXACT:
            return torch.ones_like(own_J[:, None] + blocks_B, dtype=torch.bool)
        first_J = torch.tensor([self._first_exact(own) for own in own_J.tolist()])
        return (blocks_B == 0) | (blocks_B >= first_J.to(self._device)[:, None])

    @cached_property
    def readable_blocks(self) -> Tensor:
        """readable_JB: see `selection.base.readable`."""
        return readable(self.query_blocks.own_J, self.num_blocks, self.part.recent_blocks)

    @cached_property
    def tiles(self) -> list[Tile]:
        blocks_B = self.blocks_here
        owns, counts = torch.unique_consecutive(self.query_blocks.own_J, return_counts=True)
        tiles = []
        first = row = 0
        for own, count in zip(owns.tolist(), counts.tolist(), strict=True):
            block_end = (own - self._shift + 1) * self._size
            last_row = min(self.part.end, block_end) - self.part.start
            is_near_B = self._is_exact(blocks_B, own)
            is_earlier_B = blocks_B < own
            tiles.append(
                Tile(
                    own,
                    slice(first, first + count),
                    slice(row, last_row),
                    is_earlier_B & is_near_B,
                    is_earlier_B & ~is_near_B,
                )
            )
            first, row = first + count, last_row
        return tiles

    @cached_property
    def holders(self) -> tuple[int, ...]:
        """The ranks that hold what some row may read, ascending. Those with rows are among them."""
        return tuple(rank for rank in range(self._table.num_ranks) if len(self._blocks(rank)))

    @cached_property
    def offsets(self) -> tuple[Tensor, ...]:
        """By rank: which rows of the part are its."""
        return tuple(
            self.part.positions(rank).to(self._device) - self.part.start
            for rank in range(self._table.num_ranks)
        )

    @cached_property
    def compared_blocks(self) -> tuple[Tensor, ...]:
        """By rank: the blocks that rows compare, whole ones that some row may read, ascending."""
        num_whole = self.part.end // self._size + self._shift
        blocks = [self._blocks(rank) for rank in range(self._table.num_ranks)]
        return tuple(blocks_B[blocks_B < num_whole] for blocks_B in blocks)

    @cached_property
    def has_all_blocks(self) -> bool:
        """Whether the sequence's blocks are all on one rank, and rows may read all of them."""
        is_alone = len(self.holders) == 1
        return is_alone and len(self._blocks(self.holders[0])) == self.num_blocks

    @cached_property
    def blocks_here(self) -> Tensor:
        """blocks_B: those of this rank that some row may read, ascending."""
        return self._blocks(self.part.rank)

    def held_tokens(self, blocks_B: Tensor) -> Tensor | None:  # noqa: ARG002
        """held_S: which tokens of these blocks, one after the other, are there; None: all."""
        return None

    def encoded_positions(self, layer: int, blocks_B: Tensor) -> Tensor:  # noqa: ARG002
        """positions_BS of the tokens of encoded blocks, as their codec was told them."""
        return consecutive(blocks_B * self._size, self._size)

    def _is_exact(self, blocks_B: Tensor, own: int) -> Tensor:
        """Which blocks the rows of a block read exact, if they read them."""
        return (blocks_B == 0) | (blocks_B >= self._first_exact(own))

    def _first_exact(self, own_block: int) -> int:
        """The first block that rows of a block read exact, but for block 0."""
        if self.part.codec == EXACT:
            return 0
        return self.part.exact_start(own_block * self._size) // self._size

    def own_blocks(self, group: int) -> RankBlocks:
        """Where `blocks_here` lie in a KV group."""
        rank, encoded_below = self.part.rank, self._first_exact((self.part.end - 1) // self._size)
        encoded_end = encoded_below * self._size
        exact_ids = [self._table.block_ids(rank, group, *span) for span in self._spans]
        encoded_ids = [
            self._table.encoded_ids(rank, group, max(self._size, start), min(end, encoded_end))
            for start, end in self._spans
        ]
        blocks_B = self.blocks_here
        encoded_ids_B = torch.full_like(blocks_B, -1)
        is_encoded_B = (blocks_B > 0) & (blocks_B < encoded_below)
        encoded_ids_B[is_encoded_B] = self._tensor(encoded_ids)
        return RankBlocks(blocks_B, self._tensor(exact_ids), encoded_ids_B)

    @cached_property
    def filled_blocks(self) -> Tensor:
        """Blocks of this rank whose last token this part writes, ascending."""
        starts = self._table.block_starts(self.part.rank, *self._filled_span())
        return self._tensor([starts]) // self._size + self._shift

    def filled_ids(self, group: int) -> Tensor:
        """Where those are."""
        return self._tensor([self._table.block_ids(self.part.rank, group, *self._filled_span())])

    def _filled_span(self) -> tuple[int, int]:
        first, last = self.part.start // self._size, self.part.end // self._size
        return first * self._size, last * self._size

    def _blocks(self, rank: int) -> Tensor:
        """blocks_B of a rank that some row may read, ascending."""
        starts = [self._table.block_starts(rank, *span) for span in self._spans]
        return self._tensor(starts) // self._size + self._shift

    def _index_shift(self) -> int:
        """What a block's index among all that rows choose from is more than that of its first
        position."""
        return 0

    def _tensor(self, arrays: Sequence[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(self._device)

    def _readable_spans(self) -> list[tuple[int, int]]:
        """Positions that some row may read: all, or the first block and the latest ones."""
        if self.part.recent_blocks is not None:
            first = self.part.start // self._size - self.part.recent_blocks + 1
            if first > 1:
                return [(0, self._size), (first * self._size, self.part.end)]
        return [(0, self.part.end)]
