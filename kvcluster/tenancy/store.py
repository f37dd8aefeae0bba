"""Where tenants' records are kept: the protocol that a database has to implement."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from kvcluster.tenancy.audit import ChainReport
from kvcluster.tenancy.published import PublishedPrefix
from kvcluster.tenancy.shares import TierBytes
from kvcluster.tenancy.tenant import Act, ApiKey, AuditEvent, Tenant
from kvcluster.types import TenantId


class Changes(NamedTuple):
    """Records that were written after a revision."""

    tenants: Sequence[Tenant]
    keys: Sequence[ApiKey]
    revision: int
    """Of the last change that is among them."""


class TenantStore(Protocol):
    """Tenants, keys and the audit log of a cluster, shared by all its routers.

    Every change and its audit event are one transaction: both are there or neither, also after a
    crash, and what a method has returned is on disk. Methods block; they may be called from any
    thread. All raise StoreUnavailable when the database cannot be read or written.
    """

    def version(self) -> int:
        """Another number after every change, whichever process made it. Costs microseconds."""
        ...

    def changes_since(self, revision: int) -> Changes:
        """What was written after `revision`; 0: everything. Purged records do not appear."""
        ...

    def create(self, tenant: Tenant, act: Act, *, tiers: TierBytes | None = None) -> Tenant:
        """Add a tenant, with a data key. Raises: ResourceExists, and InvalidField when its floors
        and those of the tenants that are there do not fit in `tiers` (`shares.check_floors`)."""
        ...

    def get(self, tenant: TenantId) -> Tenant:
        """Raises: ResourceNotFound."""
        ...

    def tenants_after(self, tenant: str, count: int) -> Sequence[Tenant]:
        """The first `count` whose id comes after `tenant`, in order of id."""
        ...

    def change(
        self,
        tenant: TenantId,
        act: Act,
        change: Callable[[Tenant], Tenant],
        *,
        etag: str = "",
        tiers: TierBytes | None = None,
    ) -> Tenant:
        """Write what `change` makes of the tenant as it is now. Nobody else writes in between, so
        that floors which it raises fit in `tiers` with those of others.

        Raises: ResourceNotFound, EtagMismatch, InvalidField, and what `change` raises.
        """
        ...

    def note(self, tenant: TenantId, act: Act, said: Mapping[str, object]) -> None:
        """Add an audit event of an act that changes no record. Raises: ResourceNotFound."""
        ...

    def rotate_key(self, tenant: TenantId, act: Act, *, erases: bool) -> Tenant:
        """Give the tenant a new data key. `erases`: destroy the earlier ones."""
        ...

    def delete(self, tenant: TenantId, act: Act, *, purge_after_s: float, etag: str = "") -> Tenant:
        """Destroy the tenant's data keys and mark it deleted. Raises: ResourceNotFound,
        EtagMismatch, StateConflict."""
        ...

    def undelete(self, tenant: TenantId, act: Act, *, tiers: TierBytes | None = None) -> Tenant:
        """Make a deleted tenant active, with a new data key. Raises: ResourceNotFound,
        StateConflict, and InvalidField when others have been given its floors in `tiers`."""
        ...

    def purge(self, act: Act) -> Sequence[TenantId]:
        """Remove the deleted tenants whose time has come, and their keys."""
        ...

    def data_keys(self, tenant: TenantId) -> dict[int, bytes]:
        """The tenant's data keys by version: 32 random bytes each."""
        ...

    def add_key(self, key: ApiKey, act: Act) -> ApiKey:
        """Raises: ResourceNotFound (no such tenant), ResourceExists, StateConflict (deleted)."""
        ...

    def key(self, tenant: TenantId, key: str) -> ApiKey:
        """Raises: ResourceNotFound."""
        ...

    def keys_after(self, tenant: TenantId, key: str, count: int) -> Sequence[ApiKey]:
        """The first `count` of the tenant whose id comes after `key`, in order of id."""
        ...

    def revoke_key(self, tenant: TenantId, key: str, act: Act) -> ApiKey:
        """End a key for good. Again changes nothing. Raises: ResourceNotFound."""
        ...

    def events_after(
        self, tenant: TenantId | None, number: int, count: int
    ) -> Sequence[AuditEvent]:
        """The first `count` audit events after `number`, of one tenant or of all."""
        ...

    def publish(self, prefix: PublishedPrefix, act: Act) -> PublishedPrefix:
        """Raises: ResourceExists."""
        ...

    def published(self) -> Sequence[PublishedPrefix]:
        """By id, those included that are being withdrawn."""
        ...

    def withdraw(self, prefix: str, act: Act) -> PublishedPrefix:
        """Mark it. Raises: ResourceNotFound."""
        ...

    def forget_prefix(self, prefix: str) -> None:
        """Remove one that was withdrawn: no engine has it any more."""
        ...

    def check_audit(self) -> ChainReport:
        """Read the whole audit log and check its chain."""
        ...

    def close(self) -> None:
        """Let go of the database. No other method works afterwards."""
        ...
