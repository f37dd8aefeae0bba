"""One sequence's part of a step: its rows, its keys, and who may read which.

Everything here follows from the plan alone, so all ranks compute the same and agree on every
message without asking. Built once per step and used by every layer.

Shape letters: T query rows, S keys.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcluster.attention.local import visible
from kvcluster.cache.shard import Piece, SequenceMap
from kvcluster.types import Route


@dataclass(frozen=True)
class History:
    """The keys of one KV group that a sequence's rows read besides their own chunk."""

    start: int
    end: int
    counts: tuple[int, ...]
    """Keys per rank."""
    runs: list[slice]
    """Slots of this rank's keys."""
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    """mask_TS by (rank of the rows, rank of the keys); None: every row sees every key."""


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
        num_ranks: int,
        row_offset: int,
    ) -> None:
        self._table = table
        self.rank = rank
        self._num_ranks = num_ranks
        self.start = start
        self.num_tokens = num_tokens
        self.row_offset = row_offset
        self.pieces = table.pieces(start, start + num_tokens)
        self.num_rows = tuple(
            sum(piece.end - piece.start for piece in self.pieces if piece.rank == other)
            for other in range(num_ranks)
        )
        self.has_chunk = num_tokens > 1
        self.history_end = start if self.has_chunk else start + 1
        held = [table.num_tokens(other, 0, self.history_end) for other in range(num_ranks)]
        self.is_local = not any(
            (held[other] or self.num_rows[other]) and other != self.pieces[0].rank
            for other in range(num_ranks)
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

    def slots(self, group: int) -> Tensor:
        """Slots of this rank's rows."""
        runs = self._table.runs(self.rank, group, self.start, self.start + self.num_tokens)
        if not runs:
            return torch.empty(0, dtype=torch.long)
        return torch.cat([torch.arange(run.start, run.stop) for run in runs])

    def history(self, group: int, window: int | None) -> History:
        """The keys that any row of this part may read in the group. Cached."""
        found = self._histories.get((group, window))
        if found is None:
            start = 0 if window is None else max(0, self.start - window + 1)
            found = History(
                start,
                self.history_end,
                tuple(
                    self._table.num_tokens(rank, start, self.history_end)
                    for rank in range(self._num_ranks)
                ),
                self._table.runs(self.rank, group, start, self.history_end),
            )
            self._histories[group, window] = found
        return found

    def mask(
        self,
        history: History,
        window: int | None,
        rows: int,
        keys: int,
        device: torch.device,
    ) -> Tensor | None:
        """mask_TS between the rows of one rank and the keys of another. Cached."""
        if window is None or not self.has_chunk:
            return None
        if (rows, keys) not in history.masks:
            k_positions = torch.from_numpy(self._table.positions(keys, history.start, history.end))
            mask_TS = visible(self.positions(rows), k_positions, window)
            history.masks[rows, keys] = mask_TS.to(device)
        return history.masks[rows, keys]
