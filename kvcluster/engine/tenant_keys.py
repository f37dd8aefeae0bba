"""The tenants' data keys as routers tell them: what contexts on disk are sealed under."""

from typing import NamedTuple

from kvcluster.cache.spill import DataKeys, SealedContext
from kvcluster.tenancy.shares import TenantShare, TenantShares
from kvcluster.types import TenantId


class KeyRing(NamedTuple):
    """Of one tenant."""

    uid: str
    keys: DataKeys


class TenantKeys:
    """Mutable: the keys that are known now. They are in this process's memory and nowhere else."""

    def __init__(self, local: TenantShare | None = None) -> None:
        """`local`: of the only tenant, where there is no database of tenants; None: routers tell
        the keys."""
        self._rings: dict[TenantId, KeyRing] = {}
        self._deleted: dict[TenantId, str] = {}
        self.revision = -1
        """Of the last that were applied."""
        self.are_told = local is not None
        """Whether anything is known of anybody."""
        if local is not None:
            self._take(TenantShares(shares=(local,)))

    def of(self, tenant: TenantId) -> KeyRing | None:
        """None: nothing is known of the tenant."""
        return self._rings.get(tenant)

    def apply(self, shares: TenantShares) -> bool:
        """Whether anything is known now that was not. What is older changes nothing."""
        if shares.revision <= self.revision:
            return False
        self.revision = shares.revision
        self._take(shares)
        return True

    def _take(self, shares: TenantShares) -> None:
        before, self._rings = self._rings, {}
        for share in shares.shares:
            known = before.get(share.tenant)
            if share.data_keys is not None:
                self._rings[share.tenant] = KeyRing(share.tenant_uid, dict(share.data_keys))
            elif known is not None and known.uid == share.tenant_uid:
                self._rings[share.tenant] = known
        self._deleted = dict(shares.deleted)
        self.are_told = True

    def are_destroyed(self, sealed: SealedContext) -> bool:
        """Whether the operator has destroyed the key of what is on disk. Of a tenant that nothing
        is known of, that is not said: the database may be another one."""
        owner = sealed.owner
        if self._deleted.get(owner.tenant) == owner.tenant_uid:
            return True
        ring = self._rings.get(owner.tenant)
        if sealed.is_damaged:
            # Of which tenant of this id it was is not known, nor under which key.
            return ring is None and owner.tenant in self._deleted
        if ring is None:
            return False
        return ring.uid != owner.tenant_uid or sealed.key_version not in ring.keys
