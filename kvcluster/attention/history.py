"""What a sequence's rows read besides their own chunk, and where it lies.

Tokens are kept exact or, a whole block at a time, encoded. In a sequence with a codec the first
block stays exact (it holds the attention sinks, whose error would reach every token) and so does
the block that is being filled; the others are encoded. What a row reads exact is thus a matter of
its position alone: its own block and the first one.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcluster.cache.shard import SequenceMap


@dataclass(frozen=True)
class RankHistory:
    """A history's keys on one rank, in order of position: exact, encoded, exact."""

    num_tokens: int
    num_exact_before: int
    starts_B: Tensor
    """Position of each encoded block's first token, int64."""
    num_skipped: int
    """Tokens of the first encoded block that lie before the history."""

    @property
    def num_blocks(self) -> int:
        return len(self.starts_B)

    def num_exact(self, block_size: int) -> int:
        return self.num_tokens - self.num_blocks * block_size + self.num_skipped


@dataclass(frozen=True)
class History:
    """The keys of one KV group that a sequence's rows read besides their own chunk."""

    start: int
    end: int
    ranks: tuple[RankHistory, ...]
    runs: list[slice]
    """Slots of this rank's exact keys."""
    encoded_ids_B: Tensor
    """This rank's encoded blocks."""
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    """mask_TS by (rank of the rows, rank of the keys); None: every row sees every key."""


def history(
    table: SequenceMap,
    group: int,
    positions: range,
    *,
    encoded_below: int,
    rank: int,
) -> History:
    """The history that covers `positions`, as `rank` finds it.

    Blocks before `encoded_below` (a block boundary) are encoded, all but the first; 0: none.
    """
    size = table.block_size
    start, end = positions.start, positions.stop
    # Exact up to here, then encoded up to `encoded_below`, then exact again.
    first_end = min(max(start, size), end) if encoded_below > size else end
    open_start = max(first_end, min(encoded_below, end))

    def held_by(other: int) -> RankHistory:
        starts_B = table.block_starts(other, first_end, open_start)
        skipped = max(0, first_end - int(starts_B[0])) if len(starts_B) else 0
        return RankHistory(
            num_tokens=table.num_tokens(other, start, end),
            num_exact_before=table.num_tokens(other, start, first_end),
            starts_B=torch.from_numpy(starts_B),
            num_skipped=skipped,
        )

    return History(
        start,
        end,
        tuple(held_by(other) for other in range(table.num_ranks)),
        table.runs(rank, group, start, first_end) + table.runs(rank, group, open_start, end),
        torch.from_numpy(table.encoded_ids(rank, group, first_end, open_start)),
    )
