"""The partitions of all tenants over the block pools of one ring group: the GPU tier of the cache.

Lives in the engine process. A tenant has a partition from its first request on, or from the moment
an operator gives it a share.
"""

from collections.abc import Callable, Mapping, Sequence

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import FreedBlock
from kvcluster.cache.partition import Partition, PartitionStatistics
from kvcluster.cache.pool_tier import pool_ledger, rank_statistics
from kvcluster.cache.tier import TierShare
from kvcluster.types import DEFAULT_TENANT, PUBLISHED, TenantId


class CachePartitions:
    """Owner of the pools, `pools[rank][group]`, and of the ledger that counts their blocks."""

    def __init__(
        self,
        pools: Sequence[Sequence[BlockPool]],
        *,
        block_bytes: Sequence[int],
        encoded_per_page: Callable[[str], Sequence[int]],
        exact_recent: int = 0,
        encoded_step: Callable[[str], int | None] = lambda _codec: None,
    ) -> None:
        """`block_bytes`: of an exact block of each group. The rest as for `Partition`."""
        self.ledger = pool_ledger(pools, block_bytes)
        self._pools = tuple(tuple(groups) for groups in pools)
        self._encoded_per_page = encoded_per_page
        self._exact_recent = exact_recent
        self._encoded_step = encoded_step
        self._partitions: dict[TenantId, Partition] = {}

    @property
    def num_ranks(self) -> int:
        return len(self._pools)

    def of(self, tenant: TenantId) -> Partition:
        """The tenant's partition."""
        if tenant not in self._partitions:
            self._partitions[tenant] = Partition(
                self._pools,
                tenant=tenant,
                ledger=self.ledger,
                encoded_per_page=self._encoded_per_page,
                exact_recent=self._exact_recent,
                encoded_step=self._encoded_step,
            )
            if tenant != PUBLISHED:
                self._partitions[tenant].lender = self.of(PUBLISHED)
        return self._partitions[tenant]

    def take_freed(self) -> list[FreedBlock]:
        """The blocks that have come free since the last call, of all tenants."""
        freed = [block for each in self._partitions.values() for block in each.freed]
        for partition in self._partitions.values():
            partition.freed.clear()
        return freed

    def apply(self, shares: Mapping[TenantId, TierShare]) -> None:
        """These shares hold from now on, for new and for running requests: see `TierLedger`."""
        self.ledger.apply(shares)
        for tenant, partition in tuple(self._partitions.items()):
            is_needed = tenant == PUBLISHED or tenant in self.ledger.tenants or partition.num_used
            if not is_needed:
                del self._partitions[tenant]

    @property
    def num_used(self) -> int:
        """Blocks that all tenants hold, and what is counted beside them."""
        return sum(self.of(tenant).num_used for tenant in self.ledger.tenants)

    def statistics(self) -> PartitionStatistics:
        """Of all tenants together, under the name of the one that needs no key."""
        return PartitionStatistics(
            tenant=DEFAULT_TENANT, num_used=self.num_used, ranks=rank_statistics(self._pools)
        )

    def check(self) -> None:
        """Assert that the books are exact, and that they are those of the pools."""
        self.ledger.check()
        for group in range(len(self._pools[0])):
            num_free = sum(groups[group].num_free for groups in self._pools)
            num_blocks = sum(groups[group].num_blocks for groups in self._pools)
            held = sum(self.ledger.used(tenant)[group] for tenant in self.ledger.tenants)
            assert held + num_free == num_blocks
