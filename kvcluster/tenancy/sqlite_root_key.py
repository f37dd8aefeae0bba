"""The root key of a SQLite database of tenants: noted when the database is new, checked when it is
opened, and adopted by a database that was begun without one."""

import hmac
import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from kvcluster.errors import ConfigError
from kvcluster.tenancy.audit import START, ChainHead, check_chain, head_of, sealed
from kvcluster.tenancy.root_key import RootKey
from kvcluster.tenancy.sqlite_database import SqliteDatabase
from kvcluster.tenancy.sqlite_transaction import EVENT_COLUMNS, TenantTransaction, event_in
from kvcluster.tenancy.tenant import OPERATORS, Act
from kvcluster.types import TenantId

_FINGERPRINT = "SELECT fingerprint FROM root_key"


def check_root_key(database: SqliteDatabase, path: Path, root_key: RootKey | None) -> None:
    """Whether the database was written with this root key. One in which nothing was done yet takes
    it over. Raises: ConfigError, StoreUnavailable."""
    rows: list[Any] = database.read(_FINGERPRINT)
    if root_key is None:
        if rows:
            raise ConfigError(f"tenancy.root_key: {path} was written with one: set it")
        return
    if not rows:
        with database.writing() as connection:
            rows = connection.execute(_FINGERPRINT).fetchall()
            if not rows:
                if connection.execute("SELECT number FROM audit_head").fetchone() != (0,):
                    raise ConfigError(
                        f"tenancy.root_key: {path} was written without one: have it adopt this one "
                        "with `kvcluster tenants adopt-root-key`, or unset it"
                    )
                _note(connection, root_key)
                return
    if not hmac.compare_digest(rows[0][0], root_key.fingerprint):
        raise ConfigError(f"tenancy.root_key: {path} was written with another root key")


def adopt_root_key(path: Path, root_key: RootKey, act: Act, *, now: float) -> int:
    """Wrap the data keys of a database that has no root key, and sign its audit log, in which this
    is the last event. No router may run meanwhile with another setting. Returns how many events
    were signed.

    Raises: ConfigError when it has a root key, or its audit log was changed; StoreUnavailable.
    """
    database = SqliteDatabase(path, busy_timeout_s=5.0)
    try:
        with database.writing() as connection:
            if connection.execute(_FINGERPRINT).fetchall():
                raise ConfigError(f"tenancy.root_key: {path} has one")
            _wrap_data_keys(connection, root_key)
            unsigned_digest = _sign_events(connection, root_key, path)
            _note(connection, root_key)
            transaction = TenantTransaction(connection, act, now, root_key)
            # Whoever kept the last digest elsewhere can tell that this log goes on from there.
            transaction.audit(OPERATORS, "rootKey", f'{{"before":"{unsigned_digest.hex()}"}}')
            (number,) = connection.execute("SELECT number FROM audit_head").fetchone()
        database.truncate_log()
    finally:
        database.close()
    return int(number)


def _note(connection: sqlite3.Connection, root_key: RootKey) -> None:
    connection.execute("INSERT INTO root_key VALUES (1, ?)", (root_key.fingerprint,))


def _wrap_data_keys(connection: sqlite3.Connection, root_key: RootKey) -> None:
    for tenant, version, key in connection.execute("SELECT * FROM data_keys").fetchall():
        connection.execute(
            "UPDATE data_keys SET key = ? WHERE tenant = ? AND version = ?",
            (root_key.wrap(TenantId(tenant), version, key), tenant, version),
        )


def _sign_events(connection: sqlite3.Connection, root_key: RootKey, path: Path) -> bytes:
    """The digest that the last event had. Raises: ConfigError."""
    query = f"SELECT {EVENT_COLUMNS} FROM audit_events ORDER BY number"
    events = [event_in(row) for row in connection.execute(query).fetchall()]
    head = connection.execute("SELECT number, digest FROM audit_head").fetchone()
    report = check_chain(events, ChainHead(*head))
    if report.fault:
        raise ConfigError(
            f"--database: the audit log of {path} was changed ({report.fault}), so it is not signed"
        )
    previous = START
    for event in events:
        signed = sealed(msgspec.structs.replace(event, previous=previous), root_key.audit_key)
        connection.execute(
            "UPDATE audit_events SET previous = ?, digest = ? WHERE number = ?",
            (signed.previous, signed.digest, signed.number),
        )
        previous = signed.digest
        connection.execute(
            "UPDATE audit_head SET digest = ?, mac = ?", head_of(signed, root_key.audit_key)[1:]
        )
    return report.digest
