"""One tenant's share of the block pools of a ring group, and the only way to a block.

Lives in the engine process. Every entry of a block table has a block in each KV group of its
rank, so entries are taken in all groups or in none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable, TableEntry
from kvcluster.types import BlockId, ModelSpec, Rank, TenantId


@dataclass(frozen=True, slots=True)
class RankStatistics:
    """Blocks of one rank, over all KV groups."""

    num_blocks: int
    num_free: int


@dataclass(frozen=True, slots=True)
class PartitionStatistics:
    """A snapshot of one tenant's share."""

    tenant: TenantId
    num_used: int
    """Blocks that this tenant holds, over all ranks and groups."""
    limit_blocks: int | None
    ranks: tuple[RankStatistics, ...]


class Partition:
    """What one tenant may take from the pools. `pools[rank][group]` may be shared by partitions.

    `limit_blocks` is the most blocks of any one KV group, over all ranks, that the tenant may
    hold; None: as many as the pools have.
    """

    def __init__(
        self,
        pools: Sequence[Sequence[BlockPool]],
        *,
        tenant: TenantId,
        limit_blocks: int | None = None,
    ) -> None:
        self.tenant = tenant
        self.limit_blocks = limit_blocks
        self._pools = tuple(tuple(groups) for groups in pools)
        self._used = [0] * self.num_groups

    @property
    def num_ranks(self) -> int:
        return len(self._pools)

    @property
    def num_groups(self) -> int:
        return len(self._pools[0])

    @property
    def num_used(self) -> int:
        return sum(self._used)

    def free_entries(self, rank: Rank) -> int:
        """Table entries that the rank could still take for this tenant."""
        return min(
            self._within_limit(group, pool.num_free) for group, pool in enumerate(self._pools[rank])
        )

    def free_blocks(self, rank: Rank) -> int:
        """Free blocks of the rank over all groups: the measure of how empty it is."""
        return sum(pool.num_free for pool in self._pools[rank])

    def append(self, table: BlockTable, rank: Rank) -> TableEntry | None:
        """Take a block in every group of `rank` and add the entry to `table`.

        None, and nothing taken, when any group has none left or the limit is reached.
        """
        if self.free_entries(rank) < 1:
            return None
        block_ids: list[BlockId] = []
        for group, pool in enumerate(self._pools[rank]):
            block_id = pool.allocate(table.last_id(rank, group))
            assert block_id is not None, "free_entries counted a block that the pool has not"
            block_ids.append(block_id)
            self._used[group] += 1
        entry = TableEntry(rank, tuple(block_ids))
        table.add(entry)
        return entry

    def release_below(self, table: BlockTable, group: int, below: int) -> None:
        """Free one group's blocks of all entries before `below`. The entries stay in the table."""
        for rank, block_id in table.remove_below(group, below):
            self._pools[rank][group].release(block_id)
            self._used[group] -= 1

    def release_all(self, table: BlockTable) -> None:
        """Free every block of `table`."""
        for group in range(self.num_groups):
            self.release_below(table, group, len(table))

    def can_hold(self, entries: Sequence[int]) -> bool:
        """Whether the empty share could hold so many entries (one number per group)."""
        return all(
            num_entries <= capacity
            for num_entries, capacity in zip(entries, self.capacity(), strict=True)
        )

    def has_room(self, entries: Sequence[int]) -> bool:
        """Whether so many more entries (one number per group) would fit now."""
        return all(
            num_entries <= num_free
            for num_entries, num_free in zip(entries, self.free_per_group(), strict=True)
        )

    def free_per_group(self) -> tuple[int, ...]:
        """Blocks per group, over all ranks, that the tenant could take now."""
        return tuple(
            self._within_limit(group, sum(groups[group].num_free for groups in self._pools))
            for group in range(self.num_groups)
        )

    def capacity(self) -> tuple[int, ...]:
        """Most blocks per group that the tenant could ever hold."""
        totals = (
            sum(groups[group].num_blocks for groups in self._pools)
            for group in range(self.num_groups)
        )
        if self.limit_blocks is None:
            return tuple(totals)
        return tuple(min(total, self.limit_blocks) for total in totals)

    def statistics(self) -> PartitionStatistics:
        return PartitionStatistics(
            tenant=self.tenant,
            num_used=self.num_used,
            limit_blocks=self.limit_blocks,
            ranks=tuple(
                RankStatistics(
                    num_blocks=sum(pool.num_blocks for pool in groups),
                    num_free=sum(pool.num_free for pool in groups),
                )
                for groups in self._pools
            ),
        )

    def _within_limit(self, group: int, num_free: int) -> int:
        if self.limit_blocks is None:
            return num_free
        return min(num_free, self.limit_blocks - self._used[group])


def entries_per_group(
    windows: Sequence[int | None], num_tokens: int, *, block_size: int, chunk_tokens: int
) -> tuple[int, ...]:
    """Most table entries per group that a sequence of `num_tokens` holds at one time, when it is
    computed in chunks of at most `chunk_tokens`.
    """
    entries = -(-num_tokens // block_size)
    return tuple(
        entries if window is None else min(entries, -(-(window + chunk_tokens) // block_size) + 1)
        for window in windows
    )


def block_bytes_per_group(spec: ModelSpec, block_size: int) -> tuple[int, ...]:
    """Bytes of one block of exact K and V, in all layers of each group together."""
    elements = [0] * len(spec.windows)
    for layer in spec.layers:
        elements[spec.group_of(layer)] += layer.kv_elements_per_token
    return tuple(block_size * spec.bytes_per_element * count for count in elements)
