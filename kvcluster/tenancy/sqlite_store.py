"""The `TenantStore` in a SQLite file: for one machine, or for routers that share a local disk."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from kvcluster.errors import ConfigError, ResourceExists, ResourceNotFound, StateConflict
from kvcluster.tenancy.audit import ChainHead, ChainReport, changed_fields, check_chain
from kvcluster.tenancy.published import PublishedPrefix
from kvcluster.tenancy.root_key import RootKey
from kvcluster.tenancy.shares import TierBytes, check_floors
from kvcluster.tenancy.sqlite_database import SqliteDatabase
from kvcluster.tenancy.sqlite_root_key import check_root_key
from kvcluster.tenancy.sqlite_transaction import (
    EVENT_COLUMNS,
    TenantTransaction,
    event_in,
    keys_in,
    no_key,
    no_tenant,
    prefixes_in,
    tenant_name,
    tenants_in,
)
from kvcluster.tenancy.store import Changes
from kvcluster.tenancy.tenant import (
    Act,
    ApiKey,
    AuditEvent,
    Tenant,
    TenantState,
    moved,
    undeleted,
    with_next_key,
)
from kvcluster.types import TenantId

_BUSY_TIMEOUT_S = 5.0
_PAGE = 1000


class SqliteTenantStore:
    """Implements `store.TenantStore`."""

    def __init__(
        self,
        path: Path,
        *,
        unix_time: Callable[[], float] = time.time,
        busy_timeout_s: float = _BUSY_TIMEOUT_S,
        root_key: RootKey | None = None,
    ) -> None:
        """Opens the file, and makes it if there is none. `busy_timeout_s`: how long a change waits
        for those of other processes. Raises: ConfigError, also where the file was written with
        another root key, with one and there is none, or without."""
        self._database = SqliteDatabase(path, busy_timeout_s=busy_timeout_s)
        self._unix_time = unix_time
        self._root_key = root_key
        try:
            check_root_key(self._database, path, root_key)
        except ConfigError:
            self._database.close()
            raise

    def close(self) -> None:
        self._database.close()

    def version(self) -> int:
        return self._database.version()

    def changes_since(self, revision: int) -> Changes:
        tenants, keys, [(latest,)] = self._database.watch(
            [
                ("SELECT record FROM tenants WHERE revision > ?", (revision,)),
                ("SELECT record FROM api_keys WHERE revision > ?", (revision,)),
                ("SELECT value FROM counters WHERE name = 'revision'", ()),
            ]
        )
        return Changes(tenants_in(tenants), keys_in(keys), _whole(latest))

    def create(self, tenant: Tenant, act: Act, *, tiers: TierBytes | None = None) -> Tenant:
        with self._writing(act) as change:
            if change.find(tenant.tenant) is not None:
                raise ResourceExists(
                    f"tenant {tenant.tenant!r} exists (or was deleted and is not purged yet): "
                    "choose another id"
                )
            check_floors(tenant, None, change.tenants(), tiers or {})
            made = with_next_key(msgspec.structs.replace(tenant, create_time_s=change.now))
            change.audit(made.tenant, tenant_name(made.tenant), changed_fields(None, made))
            made = change.put_tenant(made)
            change.add_data_key(made)
        return made

    def get(self, tenant: TenantId) -> Tenant:
        rows = self._database.read("SELECT record FROM tenants WHERE tenant = ?", tenant)
        if not rows:
            raise no_tenant(tenant)
        return tenants_in(rows)[0]

    def tenants_after(self, tenant: str, count: int) -> Sequence[Tenant]:
        query = "SELECT record FROM tenants WHERE tenant > ? ORDER BY tenant LIMIT ?"
        return tenants_in(self._database.read(query, tenant, count))

    def change(
        self,
        tenant: TenantId,
        act: Act,
        change: Callable[[Tenant], Tenant],
        *,
        etag: str = "",
        tiers: TierBytes | None = None,
    ) -> Tenant:
        with self._writing(act) as writing:
            before = writing.changeable(tenant, etag)
            changed = writing.replace(before, change)
            check_floors(changed, before, writing.tenants(), tiers or {})
        return changed

    def note(self, tenant: TenantId, act: Act, said: Mapping[str, object]) -> None:
        with self._writing(act) as writing:
            if writing.find(tenant) is None:
                raise no_tenant(tenant)
            text = msgspec.json.encode(said, order="sorted").decode()
            writing.audit(tenant, tenant_name(tenant), text)

    def rotate_key(self, tenant: TenantId, act: Act, *, erases: bool) -> Tenant:
        with self._writing(act) as writing:
            before = writing.changeable(tenant, "")
            if before.state is TenantState.DELETED:
                raise StateConflict("the tenant is deleted, and its data key destroyed")
            changed = writing.replace(before, with_next_key, erases=erases)
            if erases:
                writing.remove_data_keys(tenant)
            writing.add_data_key(changed)
        if erases:
            self._database.truncate_log()
        return changed

    def delete(self, tenant: TenantId, act: Act, *, purge_after_s: float, etag: str = "") -> Tenant:
        with self._writing(act) as writing:

            def deleted(before: Tenant) -> Tenant:
                return msgspec.structs.replace(
                    moved(before, TenantState.DELETED),
                    key_version=0,
                    delete_time_s=writing.now,
                    purge_time_s=writing.now + purge_after_s,
                )

            changed = writing.replace(writing.changeable(tenant, etag), deleted)
            writing.remove_data_keys(tenant)
        self._database.truncate_log()
        return changed

    def undelete(self, tenant: TenantId, act: Act, *, tiers: TierBytes | None = None) -> Tenant:
        with self._writing(act) as writing:
            before = writing.changeable(tenant, "")
            changed = writing.replace(before, lambda found: with_next_key(undeleted(found)))
            check_floors(changed, None, writing.tenants(), tiers or {})
            writing.add_data_key(changed)
        return changed

    def purge(self, act: Act) -> Sequence[TenantId]:
        purged: list[TenantId] = []
        now = self._unix_time()
        for tenant in self._alltenants_in():
            if tenant.purge_time_s is None or tenant.purge_time_s > now:
                continue
            with self._writing(act) as writing:
                # Another router may have been first, or an operator have undeleted it.
                found = writing.find(tenant.tenant)
                if found is None or found.revision != tenant.revision:
                    continue
                writing.audit(tenant.tenant, tenant_name(tenant.tenant), "{}")
                writing.remove(tenant.tenant)
            purged.append(tenant.tenant)
        if purged or self._database.needs_truncation:
            self._database.truncate_log()
        return purged

    def data_keys(self, tenant: TenantId) -> dict[int, bytes]:
        query = "SELECT version, key FROM data_keys WHERE tenant = ? ORDER BY version"
        rows: list[Any] = self._database.read(query, tenant)
        if self._root_key is None:
            return dict(rows)
        return {
            version: self._root_key.unwrap(tenant, version, wrapped) for version, wrapped in rows
        }

    def add_key(self, key: ApiKey, act: Act) -> ApiKey:
        with self._writing(act) as writing:
            tenant = writing.find(key.tenant)
            if tenant is None:
                raise no_tenant(key.tenant)
            if tenant.state is TenantState.DELETED:
                raise StateConflict("the tenant is deleted: undelete it first")
            if writing.find_key(key.tenant, key.key) is not None:
                raise ResourceExists(f"API key {key.key!r} exists: choose another id")
            made = msgspec.structs.replace(key, create_time_s=writing.now, tenant_uid=tenant.uid)
            writing.audit(key.tenant, key.name, changed_fields(None, made))
            writing.put_key(made)
        return made

    def key(self, tenant: TenantId, key: str) -> ApiKey:
        query = "SELECT record FROM api_keys WHERE tenant = ? AND key = ?"
        rows = self._database.read(query, tenant, key)
        if not rows:
            raise no_key(key)
        return keys_in(rows)[0]

    def keys_after(self, tenant: TenantId, key: str, count: int) -> Sequence[ApiKey]:
        query = "SELECT record FROM api_keys WHERE tenant = ? AND key > ? ORDER BY key LIMIT ?"
        return keys_in(self._database.read(query, tenant, key, count))

    def revoke_key(self, tenant: TenantId, key: str, act: Act) -> ApiKey:
        with self._writing(act) as writing:
            before = writing.find_key(tenant, key)
            if before is None:
                raise no_key(key)
            if before.revoke_time_s is not None:
                return before
            revoked = msgspec.structs.replace(before, revoke_time_s=writing.now)
            writing.audit(tenant, before.name, changed_fields(before, revoked))
            writing.put_key(revoked)
        return revoked

    def events_after(
        self, tenant: TenantId | None, number: int, count: int
    ) -> Sequence[AuditEvent]:
        where = "number > ?" if tenant is None else "number > ? AND tenant = ?"
        query = f"SELECT {EVENT_COLUMNS} FROM audit_events WHERE {where} ORDER BY number LIMIT ?"
        values = (number, count) if tenant is None else (number, tenant, count)
        return [event_in(row) for row in self._database.read(query, *values)]

    def publish(self, prefix: PublishedPrefix, act: Act) -> PublishedPrefix:
        with self._writing(act) as writing:
            if writing.find_prefix(prefix.prefix) is not None:
                raise ResourceExists(
                    f"published prefix {prefix.prefix!r} exists, or is being withdrawn: choose "
                    "another id"
                )
            made = msgspec.structs.replace(prefix, create_time_s=writing.now)
            writing.put_prefix(made)
        return made

    def published(self) -> Sequence[PublishedPrefix]:
        query = "SELECT record FROM published_prefixes ORDER BY prefix"
        return prefixes_in(self._database.read(query))

    def withdraw(self, prefix: str, act: Act) -> PublishedPrefix:
        with self._writing(act) as writing:
            found = writing.find_prefix(prefix)
            if found is None:
                raise ResourceNotFound(f"there is no published prefix {prefix!r}: check the id")
            withdrawn = msgspec.structs.replace(found, is_withdrawn=True)
            writing.put_prefix(withdrawn)
        return withdrawn

    def forget_prefix(self, prefix: str) -> None:
        with self._database.writing() as connection:
            connection.execute("DELETE FROM published_prefixes WHERE prefix = ?", (prefix,))

    def check_audit(self) -> ChainReport:
        query = "SELECT number, digest, mac, (SELECT max(number) FROM audit_events) FROM audit_head"
        rows: list[Any] = self._database.read(query)
        *head, last = rows[0] if rows else (-1, b"", b"", None)
        key = self._root_key.audit_key if self._root_key else b""
        # Events that are added from now on are checked the next time.
        return check_chain(self._events_up_to(last or 0), ChainHead(*head), key)

    def _events_up_to(self, last: int) -> Iterator[AuditEvent]:
        number = -1
        while page := self.events_after(None, number, _PAGE):
            for event in page:
                if event.number > last:
                    return
                yield event
            number = page[-1].number

    def _alltenants_in(self) -> Iterator[Tenant]:
        after = ""
        while page := self.tenants_after(after, _PAGE):
            yield from page
            after = page[-1].tenant

    @contextmanager
    def _writing(self, act: Act) -> Iterator[TenantTransaction]:
        with self._database.writing(keeps=not act.validates_only) as connection:
            yield TenantTransaction(connection, act, self._unix_time(), self._root_key)


def _whole(value: object) -> int:
    assert isinstance(value, int), "the column is an integer"
    return value
