"""What one transaction on the tenants' records reads and writes."""

import secrets
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvcluster.errors import EtagMismatch, ResourceNotFound, StateConflict
from kvcluster.tenancy.audit import changed_fields, head_of, sealed
from kvcluster.tenancy.published import PublishedPrefix
from kvcluster.tenancy.root_key import RootKey
from kvcluster.tenancy.tenant import OPERATORS, Act, ApiKey, AuditEvent, Tenant
from kvcluster.types import TenantId

DATA_KEY_BYTES = 32
EVENT_COLUMNS = "number, tenant, time_s, principal, method, target, peer, change, previous, digest"


class TenantTransaction:
    """One transaction: an audit event, then the act that it tells of."""

    def __init__(
        self, connection: sqlite3.Connection, act: Act, now: float, root_key: RootKey | None = None
    ) -> None:
        """`root_key`: None keeps data keys and the audit log without one."""
        self.now = now
        self._root_key = root_key
        self._connection = connection
        self._act = act
        connection.execute("UPDATE counters SET value = value + 1 WHERE name = 'revision'")
        (self._revision,) = connection.execute(
            "SELECT value FROM counters WHERE name = 'revision'"
        ).fetchone()

    def find(self, tenant: TenantId) -> Tenant | None:
        query = "SELECT record FROM tenants WHERE tenant = ?"
        rows = self._connection.execute(query, (tenant,)).fetchall()
        return tenants_in(rows)[0] if rows else None

    def tenants(self) -> Sequence[Tenant]:
        """All of them, as this transaction leaves them so far."""
        return tenants_in(self._connection.execute("SELECT record FROM tenants").fetchall())

    def changeable(self, tenant: TenantId, etag: str) -> Tenant:
        """Raises: ResourceNotFound, EtagMismatch, StateConflict for the operators."""
        found = self.find(tenant)
        if found is None:
            raise no_tenant(tenant)
        if tenant == OPERATORS:
            raise StateConflict(f"the tenant {OPERATORS} is always there as it is")
        if etag and etag != found.etag:
            raise EtagMismatch(
                f"tenant {tenant} was changed since: read it again, and decide again",
                metadata={"etag": found.etag},
            )
        return found

    def find_key(self, tenant: TenantId, key: str) -> ApiKey | None:
        query = "SELECT record FROM api_keys WHERE tenant = ? AND key = ?"
        rows = self._connection.execute(query, (tenant, key)).fetchall()
        return keys_in(rows)[0] if rows else None

    def replace(
        self, before: Tenant, change: Callable[[Tenant], Tenant], **also_said: bool
    ) -> Tenant:
        after = change(before)
        said = msgspec.json.decode(changed_fields(before, after)) | also_said
        text = msgspec.json.encode(said, order="sorted").decode()
        self.audit(before.tenant, tenant_name(before.tenant), text)
        return self.put_tenant(after)

    def put_tenant(self, tenant: Tenant) -> Tenant:
        written = msgspec.structs.replace(tenant, update_time_s=self.now, revision=self._revision)
        self._connection.execute(
            "INSERT INTO tenants VALUES (?, ?, ?) ON CONFLICT (tenant) "
            "DO UPDATE SET revision = excluded.revision, record = excluded.record",
            (tenant.tenant, self._revision, _json(written)),
        )
        return written

    def put_key(self, key: ApiKey) -> None:
        self._connection.execute(
            "INSERT INTO api_keys VALUES (?, ?, ?, ?, ?) ON CONFLICT (tenant, key) "
            "DO UPDATE SET revision = excluded.revision, record = excluded.record",
            (key.tenant, key.key, key.uid, self._revision, _json(key)),
        )

    def find_prefix(self, prefix: str) -> PublishedPrefix | None:
        query = "SELECT record FROM published_prefixes WHERE prefix = ?"
        rows = self._connection.execute(query, (prefix,)).fetchall()
        return prefixes_in(rows)[0] if rows else None

    def put_prefix(self, prefix: PublishedPrefix) -> None:
        """Write it down, and that it was, without what it says."""
        said = {"model": prefix.model, "policy": prefix.policy, "withdrawn": prefix.is_withdrawn}
        self.audit(OPERATORS, prefix.name, msgspec.json.encode(said, order="sorted").decode())
        self._connection.execute(
            "INSERT INTO published_prefixes VALUES (?, ?) ON CONFLICT (prefix) "
            "DO UPDATE SET record = excluded.record",
            (prefix.prefix, msgspec.json.encode(prefix).decode()),
        )

    def add_data_key(self, tenant: Tenant) -> None:
        self._connection.execute(
            "INSERT INTO data_keys VALUES (?, ?, ?)",
            (tenant.tenant, tenant.key_version, self._stored(tenant)),
        )

    def _stored(self, tenant: Tenant) -> bytes:
        key = secrets.token_bytes(DATA_KEY_BYTES)
        if self._root_key is None:
            return key
        return self._root_key.wrap(tenant.tenant, tenant.key_version, key)

    def remove_data_keys(self, tenant: TenantId) -> None:
        self._connection.execute("DELETE FROM data_keys WHERE tenant = ?", (tenant,))

    def remove(self, tenant: TenantId) -> None:
        self.remove_data_keys(tenant)
        self._connection.execute("DELETE FROM api_keys WHERE tenant = ?", (tenant,))
        self._connection.execute("DELETE FROM tenants WHERE tenant = ?", (tenant,))

    def audit(self, tenant: TenantId, target: str, change: str) -> None:
        number, digest = self._connection.execute(
            "SELECT number, digest FROM audit_head"
        ).fetchone()
        key = self._root_key.audit_key if self._root_key else b""
        event = sealed(
            AuditEvent(
                number=number + 1,
                tenant=tenant,
                time_s=self.now,
                principal=self._act.principal,
                method=self._act.method,
                target=target,
                peer=self._act.peer,
                change=change,
                previous=digest,
            ),
            key,
        )
        self._connection.execute(
            f"INSERT INTO audit_events ({EVENT_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)",
            msgspec.structs.astuple(event),
        )
        self._connection.execute(
            "UPDATE audit_head SET number = ?, digest = ?, mac = ?", head_of(event, key)
        )


def tenants_in(rows: Sequence[tuple[Any, ...]]) -> list[Tenant]:
    return [msgspec.json.decode(record, type=Tenant) for (record,) in rows]


def keys_in(rows: Sequence[tuple[Any, ...]]) -> list[ApiKey]:
    return [msgspec.json.decode(record, type=ApiKey) for (record,) in rows]


def prefixes_in(rows: Sequence[tuple[Any, ...]]) -> list[PublishedPrefix]:
    return [msgspec.json.decode(record, type=PublishedPrefix) for (record,) in rows]


def event_in(row: tuple[Any, ...]) -> AuditEvent:
    return AuditEvent(**dict(zip(AuditEvent.__struct_fields__, row, strict=True)))


def _json(record: Tenant | ApiKey) -> str:
    return msgspec.json.encode(record).decode()


def tenant_name(tenant: TenantId) -> str:
    return f"tenants/{tenant}"


def no_tenant(tenant: TenantId) -> ResourceNotFound:
    return ResourceNotFound(f"there is no tenant {tenant!r}: check the id")


def no_key(key: str) -> ResourceNotFound:
    return ResourceNotFound(f"there is no API key {key!r}: check the id")
