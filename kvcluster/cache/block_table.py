"""The block table of one sequence: which rank owns each entry, and its block in every KV group.

Entry i covers positions [i * block_size, (i + 1) * block_size). Ownership is data, not a formula.
"""

from typing import NamedTuple

from kvcluster.types import NO_BLOCK, BlockId, Rank


class TableEntry(NamedTuple):
    """One entry: the rank, and one block id per KV group in that rank's pools."""

    rank: Rank
    block_ids: tuple[BlockId, ...]


class BlockTable:
    """Entries in order of position. Only a `Partition` changes it, so counts stay right."""

    def __init__(self, num_groups: int) -> None:
        self.owners: list[Rank] = []
        self.block_ids: list[list[BlockId]] = [[] for _ in range(num_groups)]
        """`[group][entry]`; NO_BLOCK where that group has released the entry."""
        self.released_below: list[int] = [0] * num_groups
        """Per group: entries before this one are released."""
        self._last_ids: list[dict[Rank, BlockId]] = [{} for _ in range(num_groups)]

    def __len__(self) -> int:
        return len(self.owners)

    def num_held(self, group: int) -> int:
        """Entries that still have a block in this group."""
        return len(self.owners) - self.released_below[group]

    def last_id(self, rank: Rank, group: int) -> BlockId | None:
        """The block that this sequence took last on a rank, where the next should follow."""
        return self._last_ids[group].get(rank)

    def add(self, entry: TableEntry) -> None:
        self.owners.append(entry.rank)
        for group, block_id in enumerate(entry.block_ids):
            self.block_ids[group].append(block_id)
            self._last_ids[group][entry.rank] = block_id

    def remove_below(self, group: int, below: int) -> list[tuple[Rank, BlockId]]:
        """Forget the group's blocks of entries before `below`; returns those, in order."""
        start = self.released_below[group]
        if below <= start:
            return []
        ids = self.block_ids[group]
        removed = list(zip(self.owners[start:below], ids[start:below], strict=True))
        ids[start:below] = [NO_BLOCK] * (below - start)
        self.released_below[group] = below
        return removed
