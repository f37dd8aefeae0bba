"""One sequence's part of a step: its rows, its keys, and who may read which.

Everything here follows from the plan alone, so all ranks compute the same and agree on every
message without asking. Built once per step and used by every layer.

Shape letters: T query rows, S keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster.attention.history import History, history
from kvcluster.attention.local import visible, visible_blocks
from kvcluster.cache.shard import Piece, SequenceMap
from kvcluster.types import EXACT, Route


class CacheRules(NamedTuple):
    """How a sequence is kept: its policy, as attention needs it."""

    codec: str = EXACT
    recent_blocks: int | None = None
    """In layers without a window, a row in block j reads block 0 and the blocks after
    j - recent_blocks; None: all."""


class FullBlocks(NamedTuple):
    """Blocks of this rank that are encoded, and where their tokens are."""

    starts_B: Tensor
    encoded_ids_B: Tensor
    first_row: int
    """This rank's packed row of the first token; the others follow."""


class SequencePart:
    """Rows [start, start + num_tokens) of one sequence; `row_offset` is this rank's first one.

    A single row is written to the store before it is read, so it counts as its own history and
    there is no chunk beside it.
    """

    def __init__(
        self,
        table: SequenceMap,
        *,
        start: int,
        num_tokens: int,
        route: Route,
        rank: int,
        row_offset: int,
        rules: CacheRules,
    ) -> None:
        """In a sequence with a codec, a part that starts inside a block ends with that block."""
        self._table = table
        self.rank = rank
        self.start = start
        self.num_tokens = num_tokens
        self.row_offset = row_offset
        self.codec = rules.codec
        self.recent_blocks = rules.recent_blocks
        self.pieces = table.pieces(start, start + num_tokens)
        self.num_rows = tuple(
            sum(piece.end - piece.start for piece in self.pieces if piece.rank == other)
            for other in range(table.num_ranks)
        )
        self.has_chunk = num_tokens > 1
        self.history_end = start if self.has_chunk else start + 1
        held = [table.num_tokens(other, 0, self.history_end) for other in range(table.num_ranks)]
        self.is_local = not any(
            (held[other] or self.num_rows[other]) and other != self.pieces[0].rank
            for other in range(table.num_ranks)
        )
        self.travels_by_query = not self.has_chunk or self.is_local or route is Route.PASS_Q
        self.route = route
        self._histories: dict[tuple[int, int | None], History] = {}

    @property
    def rows(self) -> slice:
        """This rank's rows of the part, in its packed rows."""
        return slice(self.row_offset, self.row_offset + self.num_rows[self.rank])

    @property
    def own_pieces(self) -> list[Piece]:
        return [piece for piece in self.pieces if piece.rank == self.rank]

    def positions(self, rank: int) -> Tensor:
        """Positions of a rank's rows, ascending."""
        return torch.from_numpy(
            self._table.positions(rank, self.start, self.start + self.num_tokens)
        )

    @property
    def block_size(self) -> int:
        return self._table.block_size

    @property
    def encoded_at_once(self) -> range:
        """Positions of the blocks that the part fills from their first token, without the
        sequence's first block: these are never written exact."""
        if self.codec == EXACT:
            return range(0)
        size = self._table.block_size
        first = max(size, -(-self.start // size) * size)
        return range(first, max(first, (self.start + self.num_tokens) // size * size))

    def slots(self, group: int) -> Tensor:
        """Slots of this rank's rows that are written exact."""
        at_once, end = self.encoded_at_once, self.start + self.num_tokens
        spans = [(self.start, end)]
        if at_once:
            spans = [(self.start, at_once.start), (at_once.stop, end)]
        runs = [run for span in spans for run in self._table.runs(self.rank, group, *span)]
        if not runs:
            return torch.empty(0, dtype=torch.long)
        return torch.cat([torch.arange(run.start, run.stop) for run in runs])

    def exact_rows(self) -> list[slice]:
        """This rank's packed rows that are written exact."""
        rows = self.rows
        if not self.encoded_at_once:
            return [rows]
        at_once = self.full_blocks(0)
        last = at_once.first_row + len(at_once.starts_B) * self._table.block_size
        return [slice(rows.start, at_once.first_row), slice(last, rows.stop)]

    def full_blocks(self, group: int) -> FullBlocks:
        """This rank's blocks of `encoded_at_once`."""
        at_once = self.encoded_at_once
        return FullBlocks(
            *self._encoded(group, at_once.start, at_once.stop),
            self.row_offset + self._table.num_tokens(self.rank, self.start, at_once.start),
        )

    def completed(self, group: int) -> tuple[FullBlocks, list[slice]] | None:
        """This rank's block that was begun before the part and is full after it, and the slots
        of its exact tokens. None where there is none, or it stays exact."""
        size = self._table.block_size
        first, end = self.start // size * size, self.start + self.num_tokens
        is_completed = end == first + size and self.start > first and first > 0
        if self.codec == EXACT or not is_completed or self._table.owner(first) != self.rank:
            return None
        return (
            FullBlocks(*self._encoded(group, first, end), 0),
            self._table.runs(self.rank, group, first, end),
        )

    def _encoded(self, group: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(self._table.block_starts(self.rank, start, end)),
            torch.from_numpy(self._table.encoded_ids(self.rank, group, start, end)),
        )

    def history(self, group: int, window: int | None) -> History:
        """The keys that any row of this part may read in the group. Cached."""
        found = self._histories.get((group, window))
        if found is None:
            size = self._table.block_size
            found = history(
                self._table,
                group,
                self._history_spans(window),
                encoded_below=0 if self.codec == EXACT else self.start // size * size,
                rank=self.rank,
            )
            self._histories[group, window] = found
        return found

    def _history_spans(self, window: int | None) -> tuple[range, ...]:
        end, size = self.history_end, self._table.block_size
        if window is not None:
            return (range(max(0, self.start - window + 1), end),)
        if self.recent_blocks is not None:
            first_block = self.start // size - self.recent_blocks + 1
            if first_block > 1:
                return (range(size), range(first_block * size, end))
        return (range(end),)

    def drops_inside(self, window: int | None) -> bool:
        """Whether some row of the part does not read a block that an earlier row of it reads,
        in a layer with this window of its own."""
        if self.recent_blocks is None or window is not None:
            return False
        size = self._table.block_size
        first_block, last_block = self.start // size, (self.start + self.num_tokens - 1) // size
        return last_block > first_block and last_block - self.recent_blocks + 1 > 1

    def mask(
        self,
        history: History,
        window: int | None,
        rows: int,
        keys: int,
        device: torch.device,
    ) -> Tensor | None:
        """mask_TS between the rows of one rank and the keys of another. Cached."""
        drops = self.drops_inside(window)
        if not self.has_chunk or (window is None and not drops):
            return None
        if (rows, keys) not in history.masks:
            q_positions = self.positions(rows)
            k_positions = torch.from_numpy(history.positions(self._table, keys))
            if drops:
                assert self.recent_blocks is not None
                mask_TS = visible_blocks(
                    q_positions // self.block_size,
                    k_positions // self.block_size,
                    self.recent_blocks,
                )
            else:
                mask_TS = visible(q_positions, k_positions, window)
            history.masks[rows, keys] = mask_TS.to(device)
        return history.masks[rows, keys]
