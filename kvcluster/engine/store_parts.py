"""What contexts off the GPUs are made of."""

from typing import NamedTuple

from kvcluster.cache.spill import SpillTier
from kvcluster.cache.tier import TierLedger
from kvcluster.engine.spill_plan import SpillRanks
from kvcluster.engine.tenant_keys import TenantKeys
from kvcluster.tenancy.limits import Tier


class SealedTier(NamedTuple):
    """One tier off the GPUs."""

    tier: SpillTier
    ledger: TierLedger
    """Of it, in bytes."""


class StoreParts(NamedTuple):
    """Of one engine, which has at least one of the two tiers."""

    keys: TenantKeys
    ranks: SpillRanks
    host: SealedTier | None = None
    """Memory of the machine: what is there ends with the engine."""
    disk: SealedTier | None = None
    """What is there survives the end of every process."""

    @property
    def ledgers(self) -> dict[Tier, TierLedger]:
        both = ((Tier.HOST, self.host), (Tier.DISK, self.disk))
        return {tier: sealed.ledger for tier, sealed in both if sealed is not None}
