"""One sequence's part of a step: its rows, its keys, and who may read which.

Everything here follows from the plan alone, so all ranks compute the same and agree on every
message without asking. Built once per step and used by every layer.

Shape letters: T query rows, S keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster.attention.history import History, RankHistory, history
from kvcluster.attention.local import visible, visible_blocks
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.shard import Piece, SequenceMap
from kvcluster.codec.array import consecutive
from kvcluster.types import EXACT, Route


class CacheRules(NamedTuple):
    """How a sequence is kept: its policy, as attention needs it."""

    codec: str = EXACT
    """`Policy.storage`: how blocks are written."""
    exact_blocks: int = 0
    """With a codec, a row in block j reads block 0 and the blocks from j - exact_blocks on exact,
    and with `encoded_step` some before them; the others encoded."""
    recent_blocks: int | None = None
    """In layers without a window, a row in block j reads block 0 and the blocks after
    j - recent_blocks; None: all."""
    epoch_tokens: int | None = None
    """In layers without a window, a row reads the tokens of its own epoch, exact, and what survived
    the ones before it (`survivors.SurvivorPart`); None: there are no epochs."""
    encoded_step: int | None = None
    """See `ExactRegion.step_blocks`."""


class FullBlocks(NamedTuple):
    """Blocks of this rank that become encoded, and the slots of their tokens."""

    starts_B: Tensor
    encoded_ids_B: Tensor
    runs: list[slice]


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
        self.table = table
        self.rank = rank
        self.start = start
        self.num_tokens = num_tokens
        self.row_offset = row_offset
        self.end = start + num_tokens
        self.rules = rules
        self.codec = rules.codec
        self.recent_blocks = rules.recent_blocks
        self._exact = ExactRegion(rules.exact_blocks, rules.encoded_step)
        assert self.end <= self._exact.chunk_end(start, self.end, table.block_size), (
            "rows that are computed together lie in one step"
        )
        self.pieces = table.pieces(start, self.end)
        self.num_rows = tuple(
            sum(piece.end - piece.start for piece in self.pieces if piece.rank == other)
            for other in range(table.num_ranks)
        )
        self.has_chunk = num_tokens > 1
        history_end = self.near_start(None) if self.has_chunk else self.end
        held = [table.num_tokens(other, 0, history_end) for other in range(table.num_ranks)]
        self.is_local = not any(
            (held[other] or self.num_rows[other]) and other != self.pieces[0].rank
            for other in range(table.num_ranks)
        )
        self.travels_by_query = not self.has_chunk or self.is_local or route is Route.PASS_Q
        self.route = route
        self._histories: dict[tuple[int, int | None], History] = {}
        self._full_blocks: dict[int, FullBlocks | None] = {}

    @property
    def whole(self) -> "SequencePart":
        """The part of the step whose rows these are: itself, but for a `SurvivorReader`."""
        return self

    @property
    def rows(self) -> slice:
        """This rank's rows of the part, in its packed rows."""
        return slice(self.row_offset, self.row_offset + self.num_rows[self.rank])

    @property
    def own_pieces(self) -> list[Piece]:
        return [piece for piece in self.pieces if piece.rank == self.rank]

    def positions(self, rank: int) -> Tensor:
        """Positions of a rank's rows, ascending."""
        return torch.from_numpy(self.table.positions(rank, self.start, self.end))

    def codec_in(self, window: int | None) -> str:
        """How history is stored in a layer with this window of its own."""
        has_epochs = window is None and self.rules.epoch_tokens is not None
        return EXACT if has_epochs else self.codec

    @property
    def block_size(self) -> int:
        return self.table.block_size

    def near_start(self, window: int | None) -> int:
        """Where the keys begin that the chunk's rows read by themselves, in a layer with this
        window: its own and, with a codec, earlier ones that some row reads exact."""
        if self.codec_in(window) == EXACT or not self.has_chunk:
            return self.start
        size = self.table.block_size
        block = self._exact.first_block(self.start // size)
        if window is not None:
            block = max(block, (self.start - window + 1) // size)
        elif self.recent_blocks is not None:
            block = max(block, self.start // size - self.recent_blocks + 1)
        return max(0, block) * size

    def near_pieces(self, window: int | None) -> list[Piece]:
        """Owners of those keys, in order of position."""
        return self.table.pieces(self.near_start(window), self.end)

    def num_near(self, window: int | None, rank: int) -> int:
        """How many of those keys are in the cache of a rank."""
        return self.table.num_tokens(rank, self.near_start(window), self.start)

    def near_runs(self, group: int, window: int | None) -> list[slice]:
        """Slots of those on this rank."""
        return self.table.runs(self.rank, group, self.near_start(window), self.start)

    def exact_start(self, position: int) -> int:
        """First position that the row reads exact, but for the first block."""
        return self._exact.first_block(position // self.block_size) * self.block_size

    def slots(self, group: int) -> Tensor:
        """Slots of this rank's rows."""
        runs = self.table.runs(self.rank, group, self.start, self.end)
        if not runs:
            return torch.empty(0, dtype=torch.long)
        return torch.cat([torch.arange(run.start, run.stop) for run in runs])

    def slot(self, group: int) -> int:
        """The slot of the only row, which is here."""
        [run] = self.table.runs(self.rank, group, self.start, self.end)
        return int(run.start)

    def full_blocks(self, group: int) -> FullBlocks | None:
        """This rank's blocks that no row after this part reads exact. None where there are none.
        Cached."""
        if group not in self._full_blocks:
            self._full_blocks[group] = self._find_full_blocks(group)
        return self._full_blocks[group]

    def _full_range(self, group: int) -> tuple[int, int]:
        """Positions of the blocks, everybody's, that no row after this part reads exact."""
        if self.codec == EXACT:
            return 0, 0
        size = self.table.block_size
        start = max(size, self.exact_start(self.start), self.table.released(group).stop * size)
        return start, max(start, self.exact_start(self.end))

    def _find_full_blocks(self, group: int) -> FullBlocks | None:
        start, end = self._full_range(group)
        starts = self.table.block_starts(self.rank, start, end)
        if not len(starts):
            return None
        return FullBlocks(
            torch.from_numpy(starts),
            torch.from_numpy(self.table.encoded_ids(self.rank, group, start, end)),
            self.table.runs(self.rank, group, start, end),
        )

    def sent_positions(self, layer: int, like: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """What goes with this rank's encoded blocks so that others know the positions of their
        tokens: nothing, since a table of positions tells."""
        return ()

    def positions_room(self, held: RankHistory, like: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Room for the same from another rank, on the device of `like`."""
        return ()

    def encoded_positions(
        self,
        held: RankHistory,
        sent: Sequence[Tensor],  # noqa: ARG002
    ) -> Tensor:
        """positions_BS of the tokens of encoded blocks."""
        return consecutive(held.starts_B, self.block_size)

    def history(self, group: int, window: int | None) -> History:
        """The keys that any row of this part may read in the group. Cached."""
        found = self._histories.get((group, window))
        if found is None:
            found = history(
                self.table,
                group,
                self._history_spans(window),
                encoded_below=(
                    0 if self.codec_in(window) == EXACT else self.exact_start(self.start)
                ),
                rank=self.rank,
            )
            self._histories[group, window] = found
        return found

    def _history_spans(self, window: int | None) -> tuple[range, ...]:
        end, size = self.end, self.table.block_size
        if self.has_chunk:
            end = self.near_start(window)
        if window is not None:
            first = max(0, self.start - window + 1)
            return (range(first, max(first, end)),)
        if self.rules.epoch_tokens is not None:
            return (range(self.start // self.rules.epoch_tokens * self.rules.epoch_tokens, end),)
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
        size = self.table.block_size
        first_block, last_block = self.start // size, (self.end - 1) // size
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
            k_positions = torch.from_numpy(history.positions(self.table, keys))
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
