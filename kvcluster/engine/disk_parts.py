"""What contexts on disk are made of."""

from typing import NamedTuple

from kvcluster.cache.spill import SpillTier
from kvcluster.cache.tier import TierLedger
from kvcluster.engine.spill_plan import SpillRanks
from kvcluster.engine.tenant_keys import TenantKeys


class DiskParts(NamedTuple):
    """Of one engine."""

    tier: SpillTier
    ledger: TierLedger
    """Of the disk tier, in bytes."""
    keys: TenantKeys
    ranks: SpillRanks
