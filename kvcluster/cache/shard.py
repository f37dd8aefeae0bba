"""Where the tokens of one sequence lie, as the plans told this rank. Torch-free.

Every rank keeps the same map of a sequence: block i covers positions [i * block_size,
(i + 1) * block_size) and lies on one rank, under one pool id per KV group. Ownership is what the
engine said, never a formula, so blocks may move.
"""

from array import array
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcluster.types import NO_BLOCK


class Piece(NamedTuple):
    """Consecutive positions [start, end) whose blocks lie on one rank."""

    rank: int
    start: int
    end: int


class _Owned:
    """The blocks of one sequence on one rank, in order of position. Arrays, since a step reads
    thousands of numbers: lists take a millisecond to become one."""

    def __init__(self, num_groups: int) -> None:
        self.indices = array("q")
        self.block_ids = [array("q") for _ in range(num_groups)]
        self.encoded_ids = [array("q") for _ in range(num_groups)]
        # For each block, the first block of the run of consecutive pool ids that it ends.
        self.run_starts = [array("q") for _ in range(num_groups)]

    def append(self, index: int, block_ids: tuple[int, ...], encoded_ids: tuple[int, ...]) -> None:
        entry = len(self.indices)
        self.indices.append(index)
        none = (NO_BLOCK,) * len(self.block_ids)
        for ids, block_id in zip(self.encoded_ids, encoded_ids or none, strict=True):
            ids.append(block_id)
        for ids, starts, block_id in zip(self.block_ids, self.run_starts, block_ids, strict=True):
            continues = entry > 0 and ids[-1] + 1 == block_id
            starts.append(starts[-1] if continues else entry)
            ids.append(block_id)


class SequenceMap:
    """The block table of one sequence, seen from the ranks. Mutated only by plans."""

    def __init__(self, *, block_size: int, num_ranks: int, num_groups: int) -> None:
        self.block_size = block_size
        self._owners: list[int] = []
        self._owned = [_Owned(num_groups) for _ in range(num_ranks)]
        self._released = [range(0)] * num_groups

    @property
    def num_ranks(self) -> int:
        return len(self._owned)

    @property
    def num_groups(self) -> int:
        return len(self._released)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the table has room for."""
        return len(self._owners) * self.block_size

    def append(
        self, rank: int, block_ids: tuple[int, ...], encoded_ids: tuple[int, ...] = ()
    ) -> None:
        """Add the next entry: an exact block, and perhaps an encoded one, one id per group."""
        self._owned[rank].append(len(self._owners), block_ids, encoded_ids)
        self._owners.append(rank)

    def release(self, group: int, released: range) -> None:
        """The group's blocks of these entries belong to others now; they begin as before."""
        self._released[group] = released

    def released(self, group: int) -> range:
        """The entries that were released."""
        return self._released[group]

    def owner(self, position: int) -> int:
        return self._owners[position // self.block_size]

    def pieces(self, start: int, end: int) -> list[Piece]:
        """[start, end) cut where the owner changes."""
        pieces: list[Piece] = []
        position = start
        while position < end:
            index = position // self.block_size
            block_end = min(end, (index + 1) * self.block_size)
            rank = self._owners[index]
            if pieces and pieces[-1].rank == rank:
                pieces[-1] = pieces[-1]._replace(end=block_end)
            else:
                pieces.append(Piece(rank, position, block_end))
            position = block_end
        return pieces

    def num_tokens(self, rank: int, start: int, end: int) -> int:
        """How many positions of [start, end) lie on `rank`."""
        indices = self._owned[rank].indices
        first, last = self._entries(rank, start, end)
        if first == last:
            return 0
        size = self.block_size
        before = max(0, start - indices[first] * size)
        after = max(0, (indices[last - 1] + 1) * size - end)
        return (last - first) * size - before - after

    def block_starts(self, rank: int, start: int, end: int) -> NDArray[np.int64]:
        """First positions of the blocks on `rank` that overlap [start, end), ascending."""
        first, last = self._entries(rank, start, end)
        return _copy(self._owned[rank].indices, first, last) * self.block_size

    def block_ids(self, rank: int, group: int, start: int, end: int) -> NDArray[np.int64]:
        """The exact blocks of the same. Where one became encoded, its id is another's now."""
        first, last = self._entries(rank, start, end)
        return _copy(self._owned[rank].block_ids[group], first, last)

    def encoded_ids(self, rank: int, group: int, start: int, end: int) -> NDArray[np.int64]:
        """The encoded blocks of the same."""
        first, last = self._entries(rank, start, end)
        ids = _copy(self._owned[rank].encoded_ids[group], first, last)
        assert (ids != NO_BLOCK).all(), "read of a block that was never encoded"
        return ids

    def runs(self, rank: int, group: int, start: int, end: int) -> list[slice]:
        """Slots of the positions of [start, end) that lie on `rank`, in order of position.

        Slot s is token s % block_size of block s // block_size in the rank's pool of the group.
        """
        if start >= end:
            return []
        read = range(start // self.block_size, -(-end // self.block_size))
        released = self._released[group]
        overlap = range(max(read.start, released.start), min(read.stop, released.stop))
        assert not overlap, "read of a released block"
        first, last = self._entries(rank, start, end)
        if first == last:
            return []
        owned = self._owned[rank]
        size = self.block_size
        ids, run_starts = owned.block_ids[group], owned.run_starts[group]
        skipped = max(0, start - owned.indices[first] * size)
        left_over = max(0, (owned.indices[last - 1] + 1) * size - end)
        runs: list[slice] = []
        while last > first:
            begin = max(first, run_starts[last - 1])
            runs.append(slice(ids[begin] * size, (ids[last - 1] + 1) * size))
            last = begin
        runs.reverse()
        runs[0] = slice(runs[0].start + skipped, runs[0].stop)
        runs[-1] = slice(runs[-1].start, runs[-1].stop - left_over)
        return runs

    def positions(self, rank: int, start: int, end: int) -> NDArray[np.int64]:
        """The positions of [start, end) that lie on `rank`, ascending."""
        starts = self.block_starts(rank, start, end)
        if not len(starts):
            return starts
        skipped = max(0, start - int(starts[0]))
        positions = (starts[:, None] + np.arange(self.block_size, dtype=np.int64)).reshape(-1)
        return positions[skipped : skipped + self.num_tokens(rank, start, end)]

    def _entries(self, rank: int, start: int, end: int) -> tuple[int, int]:
        """Which of the rank's blocks overlap [start, end), as a range of its entries."""
        if start >= end:
            return 0, 0
        indices = self._owned[rank].indices
        first = bisect_left(indices, start // self.block_size)
        last = bisect_left(indices, -(-end // self.block_size), lo=first)
        return first, last


def _copy(numbers: "array[int]", first: int, last: int) -> NDArray[np.int64]:
    # Of a slice, which is an array of its own: one that is looked into may not grow.
    return np.frombuffer(numbers[first:last], dtype=np.int64)
