"""The engine's orders to the ranks about contexts on disk. Both cross processes as msgpack.

They go beside the steps: blocks that are written have a user that keeps them as they are, and
blocks that are read into have been zeroed and are nobody's yet.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from kvcluster.cache.spill import PartReceipt, SpillTicket
from kvcluster.engine.plan import NewBlock


class StoredBlocks(msgspec.Struct, frozen=True, array_like=True):
    """The whole blocks of one context: where they lie, and in which forms."""

    codec: str
    num_tokens: int
    blocks: tuple[NewBlock, ...]
    """One for each entry; `NO_BLOCK` where it holds none in a group or form."""
    released: tuple[tuple[int, int], ...]
    """Per KV group, the entries that no later row reads: the first, and the one after the last."""
    block_keys: tuple[bytes, ...]
    """Of each entry: keyed hash of its tokens and all before them, under a secret of the spill."""

    def owned(self, rank: int) -> list[int]:
        """The entries that lie on a rank."""
        return [entry for entry, block in enumerate(self.blocks) if block.rank == rank]


class SpillWrite(msgspec.Struct, frozen=True, array_like=True):
    """Every rank writes its entries, so many to a part: those of rank 0 first."""

    ticket: SpillTicket
    stored: StoredBlocks
    entries_per_part: int

    def parts_of(self, rank: int) -> list[tuple[int, list[int]]]:
        """Number and entries of each part that the rank writes."""
        first = sum(len(self._pieces(before)) for before in range(rank))
        return list(enumerate(self._pieces(rank), first))

    def _pieces(self, rank: int) -> list[list[int]]:
        own, size = self.stored.owned(rank), self.entries_per_part
        return [own[start : start + size] for start in range(0, len(own), size)]


class SpillRead(msgspec.Struct, frozen=True, array_like=True):
    """Every rank reads those of the wanted entries that it owns into its blocks."""

    ticket: SpillTicket
    stored: StoredBlocks
    wanted: tuple[int, ...]
    entries_at_once: int
    """How many a rank has beside its cache at one time."""


def num_parts(stored: StoredBlocks, num_ranks: int, entries_per_part: int) -> int:
    """Files that the ranks write for it."""
    counts = (len(stored.owned(rank)) for rank in range(num_ranks))
    return sum(-(-count // entries_per_part) for count in counts)


class SpillRanks(Protocol):
    """The ranks of a ring group, as contexts on disk use them."""

    async def write_spill(self, order: SpillWrite) -> Sequence[PartReceipt]:
        """Have all ranks write their parts; on return these are on the disk.

        Raises: SpillDiskFull, SpillUnavailable, RankLost.
        """
        ...

    async def read_spill(self, order: SpillRead) -> None:
        """Have all ranks read what is theirs. It returns, or raises, when no rank writes any more.

        Raises: SealedCacheDamaged, SavedCacheMismatch, SpillUnavailable, RankLost.
        """
        ...
