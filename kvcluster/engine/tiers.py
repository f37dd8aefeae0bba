"""The tiers of cache memory of one engine, and what each tenant has of them. Engine process.

Routers push the shares of all tenants, so that a floor holds for a tenant that has never sent
anything. They are kept while the ring is being started again, and hold when it serves: what proves
that it works is nobody's memory.
"""

from collections.abc import Mapping

from kvcluster.cache.partitions import CachePartitions
from kvcluster.cache.tier import TierLedger, TierShare
from kvcluster.engine.api import TierLoad
from kvcluster.tenancy.limits import Tier, TierPartition
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import TenantId


class TenantTiers:
    """Applies shares to all tiers that this engine has, and reads what is used of them."""

    def __init__(
        self, partitions: CachePartitions, beside: Mapping[Tier, TierLedger] | None = None
    ) -> None:
        """`beside`: the ledgers of the tiers below the GPUs, where the engine has them."""
        self._partitions = partitions
        self._ledgers = {Tier.GPU: partitions.ledger, **(beside or {})}
        self._shares = TenantShares()
        self._is_held_back = True

    @property
    def total_bytes(self) -> dict[str, int]:
        """Memory of each tier, over all ranks, by the tier's name."""
        return {tier.value: ledger.total_bytes for tier, ledger in self._ledgers.items()}

    def apply(self, shares: TenantShares) -> None:
        """These hold from now on, unless newer ones do. Again changes nothing."""
        if shares.revision <= self._shares.revision:
            return
        self._shares = shares
        if not self._is_held_back:
            self._apply_all()

    def hold_back(self) -> None:
        """No tenant has a share until `enforce`."""
        self._is_held_back = True
        self._partitions.apply({})

    def enforce(self) -> None:
        """The shares hold."""
        self._is_held_back = False
        self._apply_all()

    def loads(self, tenant: TenantId) -> dict[str, TierLoad]:
        """What the tenant has of each tier, by the tier's name."""
        found = {}
        for tier, ledger in self._ledgers.items():
            use = ledger.use(tenant)
            found[tier.value] = TierLoad(
                floor_bytes=use.share.floor_bytes,
                limit_bytes=use.share.limit_bytes,
                used_bytes=use.used_bytes,
                borrowed_bytes=use.borrowed_bytes,
                cached_bytes=use.idle_bytes,
            )
        return found

    def _apply_all(self) -> None:
        for tier, ledger in self._ledgers.items():
            shares = {
                share.tenant: _tier_share(getattr(share.partitions, tier.value), share.weight)
                for share in self._shares.shares
            }
            if tier is Tier.GPU:
                self._partitions.apply(shares)
            else:
                ledger.apply(shares)


def _tier_share(partition: TierPartition, weight: int) -> TierShare:
    return TierShare(
        floor_bytes=partition.floor_bytes, limit_bytes=partition.limit_bytes, weight=weight
    )
