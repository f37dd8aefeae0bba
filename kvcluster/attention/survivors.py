"""The survivors of one sequence as the ranks know them, and rows that read them.

Where a policy keeps tokens by score, a row reads the survivors of the epochs before its own, and
its own epoch. Survivors are lists, one for each KV head of each layer, all of the same length:
place i of each lies in block i // block_size of a table of their own. Keys carry their rotation, so
rows need no position of them, and all rows of a part read all of them.

Shape letters: T query rows, S candidates on this rank, J places of the lists on this rank, K KV
heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster.attention.history import History, RankHistory, history
from kvcluster.attention.part import SequencePart
from kvcluster.cache.shard import SequenceMap
from kvcluster.retention.base import Heads
from kvcluster.retention.scored import ScoredRetention
from kvcluster.types import EXACT, Route


class Marks(NamedTuple):
    """What is kept beside the keys and values of one layer on one rank."""

    positions_KJ: Tensor
    """int32, by place. 4 bytes a head and token."""
    mass_KS: Tensor | None
    """int64, by place, then the open epoch's tokens as far as they were observed: 8 bytes a head
    and token. None: nothing was given since the epoch began."""

    @property
    def num_bytes(self) -> int:
        return self.positions_KJ.nbytes + (0 if self.mass_KS is None else self.mass_KS.nbytes)


@dataclass
class SequenceSurvivors:
    """What a rank remembers of a sequence's survivors between steps."""

    method: ScoredRetention
    group: int
    """The KV group that is concerned: that of the layers without a window."""
    table: SequenceMap
    marks: dict[int, Marks] = field(default_factory=dict)
    """By layer that has K and V of its own; none before queries gave anything or an epoch ended."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all marks on this rank, which `retention.base.Budgeted.marks` counts."""
        return sum(marks.num_bytes for marks in self.marks.values())

    def marks_of(self, layer: int, num_heads: int, device: torch.device) -> Marks:
        """The layer's marks; empty ones where there are none yet."""
        found = self.marks.get(layer)
        if found is None:
            none_KJ = torch.empty(num_heads, 0, dtype=torch.int32, device=device)
            found = Marks(none_KJ, None)
        return found


class SurvivorPart:
    """What survivors are to the rows of one part, all of which lie in one epoch."""

    def __init__(self, part: SequencePart, survivors: SequenceSurvivors) -> None:
        self.part = part
        self.survivors = survivors
        method = survivors.method
        self.epoch_start = part.start // method.epoch_tokens * method.epoch_tokens
        epoch_end = self.epoch_start + method.epoch_tokens
        assert part.end <= epoch_end, "a part lies in one epoch"
        self.num_before = method.counts(self.epoch_start).kept
        """Tokens of each list as the rows read it."""
        self.num_after = method.counts(epoch_end).kept
        """And when the epoch ends."""
        self.ends_epoch = part.end == epoch_end
        self.is_observed = part.end > method.first_observed(self.epoch_start)
        """Whether some of the rows' queries give mass."""
        self.reader = SurvivorReader(part, survivors, self.num_before)

    @cached_property
    def next_reader(self) -> "SurvivorReader":
        """The lists as they are when the epoch has ended."""
        return SurvivorReader(self.part, self.survivors, self.num_after)

    @property
    def encoded_after(self) -> range:
        """Places of those lists that are encoded: whole blocks but the first."""
        size = self.survivors.table.block_size
        is_encoded = self.part.codec != EXACT
        return range(size, self.num_after // size * size) if is_encoded else range(size, size)

    def blocks_after(self, rank: int) -> Tensor:
        """The blocks of those lists on a rank, ascending."""
        lists = self.survivors.table
        return torch.from_numpy(lists.block_starts(rank, 0, self.num_after)) // lists.block_size


class SurvivorReader(SequencePart):
    """The rows of a part, as they read the survivors instead of positions."""

    def __init__(
        self, part: SequencePart, survivors: SequenceSurvivors, num_survivors: int
    ) -> None:
        super().__init__(
            part.table,
            start=part.start,
            num_tokens=part.num_tokens,
            route=part.route,
            rank=part.rank,
            row_offset=part.row_offset,
            rules=part.rules,
        )
        self._whole = part
        self._survivors = survivors
        self._lists = lists = survivors.table
        self._span = range(num_survivors)
        self._found: History | None = None
        held = [lists.num_tokens(rank, 0, num_survivors) for rank in range(lists.num_ranks)]
        self.is_local = not any(
            (held[rank] or self.num_rows[rank]) and rank != self.pieces[0].rank
            for rank in range(lists.num_ranks)
        )
        self.travels_by_query = not self.has_chunk or self.is_local or self.route is Route.PASS_Q

    @property
    def whole(self) -> SequencePart:
        """See `SequencePart`."""
        return self._whole

    def codec_in(self, window: int | None) -> str:
        """See `SequencePart`."""
        assert window is None, "layers with a window keep positions"
        return self.codec

    def history(self, group: int, window: int | None) -> History:
        """The survivors, by place."""
        assert window is None, "layers with a window keep positions"
        if self._found is None:
            whole = self._span.stop // self.block_size * self.block_size
            self._found = history(
                self._lists,
                group,
                (self._span,),
                encoded_below=0 if self.codec == EXACT else whole,
                rank=self.rank,
            )
        return self._found

    @property
    def _sends_positions(self) -> bool:
        """Heads that keep tokens of their own have no position of a place in common."""
        return self.codec != EXACT and self._survivors.method.heads is Heads.SHARED

    def sent_positions(self, layer: int, like: Tensor) -> tuple[Tensor, ...]:
        """positions_BS of this rank's encoded blocks."""
        if not self._sends_positions:
            return ()
        size, whole = self.block_size, self._span.stop // self.block_size * self.block_size
        first = self._lists.num_tokens(self.rank, 0, size)
        last = first + self._lists.num_tokens(self.rank, size, whole)
        marks = self._survivors.marks_of(layer, 1, like.device)
        return (marks.positions_KJ[0, first:last].reshape(-1, size).contiguous(),)

    def positions_room(self, held: RankHistory, like: Tensor) -> tuple[Tensor, ...]:
        """See `SequencePart`."""
        if not self._sends_positions:
            return ()
        shape = (held.num_blocks, self.block_size)
        return (torch.empty(shape, dtype=torch.int32, device=like.device),)

    def encoded_positions(self, held: RankHistory, sent: Sequence[Tensor]) -> Tensor:
        """Places stand for positions where none were sent."""
        return sent[0].long() if sent else super().encoded_positions(held, sent)
