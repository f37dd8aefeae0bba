"""A tenant, its API keys and what was done to them: the records that a `TenantStore` keeps."""

import re
from enum import StrEnum

import msgspec

from kvcluster.errors import InvalidField, StateConflict
from kvcluster.tenancy.limits import (
    Partitions,
    TenantLimits,
    check_limits,
    check_partitions,
)
from kvcluster.types import TenantId

OPERATORS = TenantId("operators")
"""The tenant whose keys administer all others. Always there, never changed, generates nothing."""
MAX_TEXT_CHARS = 200
MAX_LABELS = 64
MAX_LABEL_CHARS = 63
_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


class TenantState(StrEnum):
    ACTIVE = "active"
    SUSPENDED = "suspended"
    """All its calls are refused."""
    DRAINING = "draining"
    """Running generations finish, new ones are refused."""
    DELETED = "deleted"
    """Gone at `purge_time_s`, unless it is undeleted before."""


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Who shares the cluster and must see nothing of the others. Times are Unix seconds."""

    tenant: TenantId
    uid: str
    """Differs from that of an earlier tenant of the same id."""
    display_name: str = ""
    state: TenantState = TenantState.ACTIVE
    state_reason: str = ""
    partitions: Partitions = Partitions()
    limits: TenantLimits = TenantLimits()
    labels: dict[str, str] = {}
    key_version: int = 0
    """Of its data key, from 1; 0: destroyed."""
    last_key_version: int = 0
    """Of the last data key that it ever had: no two have the same."""
    create_time_s: float = 0.0
    update_time_s: float = 0.0
    delete_time_s: float | None = None
    purge_time_s: float | None = None
    drain_end_s: float | None = None
    """When what still runs of a draining tenant is cancelled; None: never."""
    revision: int = 0
    """Of the store's last change that touched it."""

    @property
    def etag(self) -> str:
        return f"{self.uid[:8]}-{self.revision}"


class KeyRole(StrEnum):
    """What an API key is good for."""

    INFERENCE = "inference"
    TENANT_VIEWER = "tenant_viewer"
    TENANT_ADMIN = "tenant_admin"
    OPERATOR = "operator"
    """Keys of the tenant `operators` alone, and they alone."""


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A credential as it is stored: what is secret in it only as a digest."""

    tenant: TenantId
    key: str
    """Its id within the tenant."""
    uid: str
    """Part of the secret's text, by which the record is found."""
    digest: str
    """SHA-256 of the secret's text, hexadecimal."""
    role: KeyRole
    tenant_uid: str = ""
    """Of the tenant that it was made for: its id may be another's later."""
    display_name: str = ""
    create_time_s: float = 0.0
    expire_time_s: float | None = None
    revoke_time_s: float | None = None

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}/apiKeys/{self.key}"


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """Who does what, for the audit log."""

    principal: str
    """Name of the API key; `local` without authentication."""
    method: str
    """Name of the RPC."""
    peer: str = ""
    validates_only: bool = False
    """Find out what would be answered, and leave no trace."""


class AuditEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One administrative act. `audit.digest_of` says what its digest covers."""

    number: int
    """From 1, over all tenants."""
    tenant: TenantId
    time_s: float
    principal: str
    method: str
    target: str
    peer: str
    change: str
    """The fields that were changed and their values after, as JSON. Never a secret."""
    previous: bytes
    """Digest of the event before; zeros in the first."""
    digest: bytes = b""


def check_id(field: str, text: str) -> None:
    """Raises: InvalidField."""
    if not _ID.fullmatch(text):
        raise InvalidField(
            field, "want 1 to 63 of a-z 0-9 -, the first a letter and the last no hyphen"
        )


def check_tenant(tenant: Tenant) -> None:
    """Raises: InvalidField for what an operator may have set."""
    check_text("display_name", tenant.display_name)
    check_limits(tenant.limits)
    check_partitions(tenant.partitions)
    if len(tenant.labels) > MAX_LABELS:
        raise InvalidField("labels", f"want at most {MAX_LABELS}, got {len(tenant.labels)}")
    for text in (*tenant.labels, *tenant.labels.values()):
        if len(text) > MAX_LABEL_CHARS:
            raise InvalidField("labels", f"want at most {MAX_LABEL_CHARS} characters in each")


def check_text(field: str, text: str) -> None:
    """Raises: InvalidField for text that is long, or that would break a line of a log."""
    if len(text) > MAX_TEXT_CHARS or not (text.isprintable() or not text):
        raise InvalidField(field, f"want at most {MAX_TEXT_CHARS} printable characters")


_FROM = {
    TenantState.ACTIVE: frozenset({TenantState.SUSPENDED, TenantState.DRAINING}),
    TenantState.SUSPENDED: frozenset(
        {TenantState.ACTIVE, TenantState.DRAINING, TenantState.SUSPENDED}
    ),
    TenantState.DRAINING: frozenset({TenantState.ACTIVE, TenantState.DRAINING}),
    TenantState.DELETED: frozenset(
        {TenantState.ACTIVE, TenantState.SUSPENDED, TenantState.DRAINING}
    ),
}
"""The states from which each can be reached. A deleted tenant becomes active by `undeleted`."""


def moved(tenant: Tenant, state: TenantState, *, reason: str = "") -> Tenant:
    """The tenant in another state. Raises: StateConflict."""
    if tenant.state not in _FROM[state]:
        raise StateConflict(
            f"the tenant is {tenant.state}, so it cannot become {state}",
            metadata={"state": tenant.state},
        )
    return msgspec.structs.replace(tenant, state=state, state_reason=reason, drain_end_s=None)


def undeleted(tenant: Tenant) -> Tenant:
    """Raises: StateConflict for a tenant that is not deleted."""
    if tenant.state is not TenantState.DELETED:
        raise StateConflict(
            f"the tenant is {tenant.state}: only a deleted one can be undeleted",
            metadata={"state": tenant.state},
        )
    return msgspec.structs.replace(
        tenant, state=TenantState.ACTIVE, delete_time_s=None, purge_time_s=None
    )


def with_next_key(tenant: Tenant) -> Tenant:
    """The tenant as it is once it has another data key."""
    version = tenant.last_key_version + 1
    return msgspec.structs.replace(tenant, key_version=version, last_key_version=version)
