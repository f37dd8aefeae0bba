"""The SQLite file of the tenants' records: how it is opened, migrated, read and written.

Write-ahead logging lets every process read while one writes; `synchronous=FULL` keeps what was
committed through a power cut; `secure_delete` overwrites what is deleted, because data keys are.
"""

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kvcluster.errors import ConfigError, StoreUnavailable
from kvcluster.tenancy.audit import START
from kvcluster.tenancy.tenant import OPERATORS, Tenant

APPLICATION_ID = 0x6B76_636C
"""Marks the file as ours: `kvcl`."""
_RETRY_S = 1.0
_TABLES = """
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
INSERT INTO counters VALUES ('revision', 1);
CREATE TABLE tenants (
    tenant TEXT PRIMARY KEY, revision INTEGER NOT NULL, record TEXT NOT NULL) STRICT;
CREATE INDEX tenants_by_revision ON tenants (revision);
CREATE TABLE api_keys (
    tenant TEXT NOT NULL REFERENCES tenants, key TEXT NOT NULL, uid TEXT NOT NULL UNIQUE,
    revision INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (tenant, key)) STRICT;
CREATE INDEX api_keys_by_revision ON api_keys (revision);
CREATE TABLE data_keys (
    tenant TEXT NOT NULL REFERENCES tenants, version INTEGER NOT NULL, key BLOB NOT NULL,
    PRIMARY KEY (tenant, version)) STRICT;
CREATE TABLE audit_events (
    number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, time_s REAL NOT NULL,
    principal TEXT NOT NULL, method TEXT NOT NULL, target TEXT NOT NULL, peer TEXT NOT NULL,
    change TEXT NOT NULL, previous BLOB NOT NULL, digest BLOB NOT NULL) STRICT;
CREATE INDEX audit_events_by_tenant ON audit_events (tenant, number);
CREATE TABLE audit_head (
    id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL, digest BLOB NOT NULL) STRICT;
"""


def _create_tables(connection: sqlite3.Connection) -> None:
    for statement in filter(str.strip, _TABLES.split(";")):
        connection.execute(statement)
    connection.execute("INSERT INTO audit_head VALUES (1, 0, ?)", (START,))
    now = time.time()
    operators = Tenant(
        tenant=OPERATORS,
        uid=str(uuid.uuid4()),
        create_time_s=now,
        update_time_s=now,
        revision=1,
    )
    record = msgspec.json.encode(operators).decode()
    connection.execute("INSERT INTO tenants VALUES (?, 1, ?)", (OPERATORS, record))


def _add_root_key(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE audit_head ADD COLUMN mac BLOB NOT NULL DEFAULT x''")
    connection.execute(
        "CREATE TABLE root_key (id INTEGER PRIMARY KEY CHECK (id = 1), fingerprint BLOB NOT NULL) "
        "STRICT"
    )


def _add_published_prefixes(connection: sqlite3.Connection) -> None:
    connection.execute(
        "CREATE TABLE published_prefixes (prefix TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT"
    )


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _create_tables,
    _add_root_key,
    _add_published_prefixes,
)
"""Step n takes a database of version n to version n + 1. A step that has been released is never
changed."""


class SqliteDatabase:
    """One file and this process's three connections to it: one writes, one reads, and one watches
    for changes, so that a long read holds nobody up. Usable from any thread."""

    def __init__(self, path: Path, *, busy_timeout_s: float) -> None:
        """Opens the file, makes it if there is none, and brings it to this version.

        Raises: ConfigError for a file that cannot be opened or is none of ours, or of a later
        version.
        """
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._needs_truncation = False
        try:
            _make_private(path)
            self._writer = self._connect()
            _migrate(self._writer, path)
            self._reader = self._connect()
            self._watcher = self._connect()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"tenancy.database: {path} cannot be opened: {error}") from error
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._watching = threading.Lock()

    @contextmanager
    def writing(self, *, keeps: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, alone among all processes: committed when the block ends, undone when it
        raises, or ends without `keeps`. Raises: StoreUnavailable."""
        with self._writing, _typed_errors("written"):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT" if keeps else "ROLLBACK")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def read(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """All rows. Raises: StoreUnavailable."""
        with self._reading, _typed_errors("read"):
            return self._reader.execute(query, values).fetchall()

    def version(self) -> int:
        """Another number after each commit of any connection but the watching one, which makes
        none. Raises: StoreUnavailable."""
        with self._watching, _typed_errors("read"):
            (version,) = self._watcher.execute("PRAGMA data_version").fetchone()
            return int(version)

    def watch(
        self, queries: Sequence[tuple[str, tuple[object, ...]]]
    ) -> list[list[tuple[object, ...]]]:
        """The rows of all queries, as of one moment. Raises: StoreUnavailable."""
        with self._watching, _typed_errors("read"):
            self._watcher.execute("BEGIN")
            try:
                return [
                    self._watcher.execute(query, values).fetchall() for query, values in queries
                ]
            finally:
                self._watcher.execute("COMMIT")

    def truncate_log(self) -> None:
        """Move the write-ahead log into the file and empty it: until then it still has what was
        deleted. A reader of another process can put that off to the next call."""
        with self._writing, _typed_errors("written"):
            is_busy, *_ = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._needs_truncation = bool(is_busy)

    @property
    def needs_truncation(self) -> bool:
        """`truncate_log` was put off."""
        return self._needs_truncation

    def close(self) -> None:
        with self._writing, self._reading, self._watching:
            for connection in (self._watcher, self._reader, self._writer):
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=self._busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
            "trusted_schema = OFF",
        ):
            connection.execute(f"PRAGMA {pragma}")
        return connection


def _make_private(path: Path) -> None:
    """SQLite gives its other files the mode of this one."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application != APPLICATION_ID and (num_tables or version):
            raise ConfigError(f"tenancy.database: {path} is another program's database")
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"tenancy.database: {path} was written by a later version of kvcluster "
                f"({version}, this one knows {len(MIGRATIONS)}): run that one"
            )
        for step in MIGRATIONS[version:]:
            step(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextmanager
def _typed_errors(verb: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreUnavailable(
            f"the tenants' records cannot be {verb} now ({error}): try again, or look at the "
            "database's disk",
            retry_after_s=_RETRY_S,
        ) from error
