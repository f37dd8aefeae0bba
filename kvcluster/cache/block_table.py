"""The block table of one sequence: which rank owns each entry, and its block in every KV group.

Entry i covers positions [i * block_size, (i + 1) * block_size). Ownership is data, not a formula.
"""

from collections.abc import Collection
from typing import NamedTuple

from kvcluster.types import EXACT, NO_BLOCK, BlockId, Rank


class HeldBlock(NamedTuple):
    """What an entry holds in one group; NO_BLOCK where it holds none."""

    rank: Rank
    block_id: BlockId
    encoded_id: BlockId
    is_lent: bool = False
    """The encoded block is the published prefixes', of whose pages it is part."""


class FreedBlock(NamedTuple):
    """A block that has lost its last user, and that nobody has zeroed yet."""

    rank: Rank
    group: int
    codec: str
    """`EXACT` for an exact block."""
    block_id: BlockId


class TableEntry(NamedTuple):
    """One entry: the rank, and one block id per KV group in that rank's pools; NO_BLOCK in groups
    where the entry holds none."""

    rank: Rank
    block_ids: tuple[BlockId, ...]
    """Exact blocks."""
    encoded_ids: tuple[BlockId, ...] = ()
    """Blocks of the table's codec. Empty: the entry stays exact."""

    def held(self) -> tuple[HeldBlock, ...]:
        """Per KV group."""
        encoded = self.encoded_ids or (NO_BLOCK,) * len(self.block_ids)
        return tuple(
            HeldBlock(self.rank, *ids) for ids in zip(self.block_ids, encoded, strict=True)
        )


class BlockTable:
    """Entries in order of position. Only a `Partition` changes it, so counts stay right."""

    def __init__(
        self,
        num_groups: int,
        codec: str = EXACT,
        *,
        recent_blocks: int | None = None,
        groups: Collection[int] | None = None,
        epoch_group: int | None = None,
    ) -> None:
        """`recent_blocks`: entries that a query reads beside the first one; None: all.
        `groups`: those in which entries hold blocks; None: all. `epoch_group`: the one of them
        that holds open epochs only, which are exact."""
        self.codec = codec
        self.recent_blocks = recent_blocks
        self.groups = range(num_groups) if groups is None else groups
        self.epoch_group = epoch_group
        self.owners: list[Rank] = []
        self.block_ids: list[list[BlockId]] = [[] for _ in range(num_groups)]
        """`[group][entry]`; NO_BLOCK where that group has no exact block for the entry."""
        self.encoded_ids: list[list[BlockId]] = [[] for _ in range(num_groups)]
        """The same for encoded blocks."""
        self.released_below: list[int] = [0] * num_groups
        """Per group: entries before this one are released; the first one may be held on."""
        self.num_beside: list[int] = [0] * num_groups
        """Per group: what the partition counts beside all blocks."""
        self._lent: list[set[int]] = [set() for _ in range(num_groups)]
        """Per group: entries whose encoded block is lent."""
        self._last_ids: list[dict[Rank, BlockId]] = [{} for _ in range(num_groups)]
        self._num_exact = [0] * num_groups
        self._num_encoded = [0] * num_groups

    def __len__(self) -> int:
        return len(self.owners)

    def codec_in(self, group: int) -> str:
        """How blocks of this group are encoded."""
        return EXACT if group == self.epoch_group else self.codec

    def num_exact(self, group: int) -> int:
        """Exact blocks held in this group."""
        return self._num_exact[group]

    def num_encoded(self, group: int) -> int:
        """Encoded blocks held in this group."""
        return self._num_encoded[group]

    def last_id(self, rank: Rank, group: int) -> BlockId | None:
        """The exact block that this sequence took last on a rank, where the next should follow."""
        return self._last_ids[group].get(rank)

    def entry(self, index: int) -> TableEntry:
        """What an entry holds now."""
        encoded = tuple(ids[index] for ids in self.encoded_ids)
        return TableEntry(
            self.owners[index],
            tuple(ids[index] for ids in self.block_ids),
            encoded if any(block != NO_BLOCK for block in encoded) else (),
        )

    def add(self, entry: TableEntry, *, lent: TableEntry | None = None) -> None:
        """`lent`: the entry as it is in the published prefixes, where it comes from there."""
        if lent is not None:
            for group, encoded_id in enumerate(lent.encoded_ids):
                if encoded_id != NO_BLOCK:
                    self._lent[group].add(len(self))
        none = (NO_BLOCK,) * len(self.block_ids)
        self.owners.append(entry.rank)
        for group, block_id in enumerate(entry.block_ids):
            self.block_ids[group].append(block_id)
            if block_id != NO_BLOCK:
                self._last_ids[group][entry.rank] = block_id
                self._num_exact[group] += 1
        for group, block_id in enumerate(entry.encoded_ids or none):
            self.encoded_ids[group].append(block_id)
            self._num_encoded[group] += block_id != NO_BLOCK

    def remove_below(self, group: int, below: int, *, after: int = 0) -> list[HeldBlock]:
        """Forget the group's blocks of the entries from `after` to before `below`; returns those
        that were held, in order."""
        start = max(after, self.released_below[group])
        if below <= start:
            return []
        self.released_below[group] = below
        return [self._remove(group, entry) for entry in range(start, below)]

    def remove_all(self, group: int) -> list[HeldBlock]:
        """Forget all blocks of the group; returns them, in order."""
        self.released_below[group] = len(self)
        return [self._remove(group, entry) for entry in range(len(self))]

    def clear(self) -> None:
        """Be as it was when it was made. Its blocks have been removed before."""
        assert not any(self._num_exact), "blocks are removed first"
        assert not any(self._num_encoded), "blocks are removed first"
        self.owners.clear()
        for group, lent in enumerate(self._lent):
            lent.clear()
            self.block_ids[group].clear()
            self.encoded_ids[group].clear()
            self._last_ids[group].clear()
            self.released_below[group] = 0

    def remove_exact(self, group: int, entry: int) -> HeldBlock:
        """Forget the group's exact block of an entry that is encoded now."""
        held = HeldBlock(self.owners[entry], self.block_ids[group][entry], NO_BLOCK)
        self._num_exact[group] -= held.block_id != NO_BLOCK
        self.block_ids[group][entry] = NO_BLOCK
        return held

    def _remove(self, group: int, entry: int) -> HeldBlock:
        rank, block_id, *_ = self.remove_exact(group, entry)
        encoded_id = self.encoded_ids[group][entry]
        self._num_encoded[group] -= encoded_id != NO_BLOCK
        self.encoded_ids[group][entry] = NO_BLOCK
        return HeldBlock(rank, block_id, encoded_id, entry in self._lent[group])
