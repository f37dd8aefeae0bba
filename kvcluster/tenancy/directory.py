"""What a router must know of tenants at every call: in memory, and never behind the store.

Before each answer the store is asked for its version, which costs microseconds, and read only when
that has changed. So a suspension or revocation that any process has acknowledged holds for the next
call at every router. When the store cannot be asked, no call is let in.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from kvcluster.errors import CredentialInvalid, TenantDraining, TenantSuspended
from kvcluster.tenancy.api_key import is_secret, uid_in
from kvcluster.tenancy.store import TenantStore
from kvcluster.tenancy.tenant import ApiKey, Tenant, TenantState
from kvcluster.types import TenantId

_DRAIN_RETRY_S = 60.0


class Credential(NamedTuple):
    """A secret that was found good."""

    tenant: Tenant
    key: ApiKey


class TenantDirectory:
    """Tenants and keys of `store`, by what a call brings. Used by one thread."""

    def __init__(self, store: TenantStore, *, unix_time: Callable[[], float] = time.time) -> None:
        """Raises: StoreUnavailable."""
        self._store = store
        self._unix_time = unix_time
        self._version: int | None = None
        self._revision = 0
        self._tenants: dict[TenantId, Tenant] = {}
        self._keys: dict[str, ApiKey] = {}
        self.refresh()

    @property
    def revision(self) -> int:
        """Of the newest change that is known here."""
        return self._revision

    def refresh(self) -> None:
        """Read what has changed. Raises: StoreUnavailable."""
        version = self._store.version()
        if version == self._version:
            return
        changes = self._store.changes_since(self._revision)
        self._tenants |= {tenant.tenant: tenant for tenant in changes.tenants}
        self._keys |= {key.uid: key for key in changes.keys}
        self._revision = changes.revision
        # Last: what is committed from here on gives another version, and is read the next time.
        self._version = version

    def credential(self, secret: str) -> Credential:
        """The tenant and key of a secret. Raises: CredentialInvalid, StoreUnavailable."""
        self.refresh()
        key = self._keys.get(uid_in(secret) or "")
        # Compared before anything else is looked at, so that nothing else shows in the time.
        is_right = is_secret(secret, key.digest if key else None)
        if key is None or not is_right:
            raise invalid_credential()
        return Credential(self._tenant_of(key), key)

    def tenant_of(self, uid: str) -> Tenant:
        """The tenant of a key that was found good before. Raises: CredentialInvalid where it is so
        no more, StoreUnavailable."""
        self.refresh()
        key = self._keys.get(uid)
        if key is None:
            raise invalid_credential()
        return self._tenant_of(key)

    def tenant_named(self, tenant: TenantId, *, uid: str = "") -> Tenant:
        """The tenant that a token speaks for; `uid`: that and no later one of the same id. Raises:
        CredentialInvalid where there is none, StoreUnavailable."""
        self.refresh()
        found = self._tenants.get(tenant)
        if found is None or found.state is TenantState.DELETED or uid not in ("", found.uid):
            raise invalid_credential()
        return found

    def tenants_since(self, revision: int) -> tuple[Tenant, ...]:
        """Those changed after `revision`, as far as is known here; deleted ones included."""
        return tuple(found for found in self._tenants.values() if found.revision > revision)

    def _tenant_of(self, key: ApiKey) -> Tenant:
        tenant = self._tenants.get(key.tenant)
        is_over = key.expire_time_s is not None and key.expire_time_s <= self._unix_time()
        if (
            tenant is None
            or tenant.state is TenantState.DELETED
            or tenant.uid != key.tenant_uid  # the id was given to another tenant
            or key.revoke_time_s is not None
            or is_over
        ):
            raise invalid_credential()
        return tenant


def check_served(tenant: Tenant) -> None:
    """Raises: TenantSuspended."""
    if tenant.state is TenantState.SUSPENDED:
        said = f" ({tenant.state_reason})" if tenant.state_reason else ""
        raise TenantSuspended(f"the tenant is suspended{said}: ask the operator of this server")


def check_takes_more(tenant: Tenant) -> None:
    """Whether new generations may begin. Raises: TenantSuspended, TenantDraining."""
    check_served(tenant)
    if tenant.state is TenantState.DRAINING:
        raise TenantDraining(
            "the tenant is being drained and takes no new generations: ask the operator of this "
            "server",
            retry_after_s=_DRAIN_RETRY_S,
        )


def invalid_credential() -> CredentialInvalid:
    """One text for all cases: it does not tell which."""
    return CredentialInvalid(
        "want 'authorization: Bearer SECRET' with the secret of an API key or a token of this "
        "server's identity provider; there is none, or it is unknown, expired or revoked"
    )
