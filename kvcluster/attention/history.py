"""What a sequence's rows read besides their own chunk, and where it lies.

Tokens are kept exact or, a whole block at a time, encoded. In a sequence with a codec the first
block stays exact (it holds the attention sinks, whose error would reach every token) and so do the
block that is being filled and some before it; the others are encoded. What a row reads exact is
thus a matter of its position alone.

In a sequence that keeps what is latest, a row reads the first block and the latest ones.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
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

    spans: tuple[range, ...]
    """Their positions, ascending."""
    ranks: tuple[RankHistory, ...]
    runs: list[slice]
    """Slots of this rank's exact keys."""
    encoded_ids_B: Tensor
    """This rank's encoded blocks."""
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    """mask_TS by (rank of the rows, rank of the keys); None: every row sees every key."""

    def positions(self, table: SequenceMap, rank: int) -> NDArray[np.int64]:
        """Positions of the keys on a rank, ascending."""
        held = [table.positions(rank, span.start, span.stop) for span in self.spans]
        return np.concatenate(held)


def history(
    table: SequenceMap,
    group: int,
    spans: tuple[range, ...],
    *,
    encoded_below: int,
    rank: int,
) -> History:
    """The history that covers `spans` of positions, ascending, as `rank` finds it: one, or the
    first block and another one.

    Blocks before `encoded_below` (a block boundary) are encoded, all but the first; 0: none.
    """
    size = table.block_size
    before, encoded, after = _by_storage(spans, size, encoded_below)

    def held_by(other: int) -> RankHistory:
        starts_B = table.block_starts(other, encoded.start, encoded.stop)
        skipped = max(0, encoded.start - int(starts_B[0])) if len(starts_B) else 0
        return RankHistory(
            num_tokens=sum(table.num_tokens(other, span.start, span.stop) for span in spans),
            num_exact_before=table.num_tokens(other, before.start, before.stop),
            starts_B=torch.from_numpy(starts_B),
            num_skipped=skipped,
        )

    return History(
        spans,
        tuple(held_by(other) for other in range(table.num_ranks)),
        [run for span in (before, after) for run in table.runs(rank, group, span.start, span.stop)],
        torch.from_numpy(table.encoded_ids(rank, group, encoded.start, encoded.stop)),
    )


def _by_storage(
    spans: tuple[range, ...], block_size: int, encoded_below: int
) -> tuple[range, range, range]:
    """The positions that are exact, then encoded, then exact again."""
    *first, last = spans
    if first:
        before, rest = first[0], last
    else:
        split = min(max(last.start, block_size), last.stop)
        if encoded_below <= block_size:
            split = last.stop
        before, rest = range(last.start, split), range(split, last.stop)
    open_start = max(rest.start, min(encoded_below, rest.stop))
    return before, range(rest.start, open_start), range(open_start, rest.stop)
