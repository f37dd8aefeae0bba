"""What the disk tier knows of its spills: a SQLite file of its own, which survives any crash.

Keep it on a disk that only the cluster writes: files of spills are trusted in nothing, but whoever
could put back an older copy of the index together with older files would restore older contexts of
the same tenant. A row is bound to its owner and its files by the seal around the spill's key.
"""

import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvcluster.cache.spill import DataKeys, PartReceipt, SealedContext, SpillOwner
from kvcluster.errors import (
    ConfigError,
    SealedCacheDamaged,
    SealedCacheErased,
    SpillDiskFull,
    SpillError,
    SpillUnavailable,
)
from kvcluster.types import TenantId

_APPLICATION_ID = 0x6B76_6373
"""Marks the file as ours: `kvcs`."""
_VERSION = 1
_NONCE_BYTES = 12
_TABLES = """
CREATE TABLE spills (
    spill TEXT PRIMARY KEY, tenant TEXT NOT NULL, context TEXT NOT NULL,
    record BLOB NOT NULL, receipts BLOB NOT NULL, wrapped_key BLOB NOT NULL) STRICT;
CREATE UNIQUE INDEX spills_by_context ON spills (tenant, context);
"""
_COLUMNS = "spill, tenant, context, record, receipts, wrapped_key"


class IndexedSpill(NamedTuple):
    """One row."""

    sealed: SealedContext
    receipts: tuple[PartReceipt, ...]
    wrapped_key: bytes


class SpillIndex:
    """`SpillRows`: committed spills alone. Usable from any thread."""

    def __init__(self, path: Path) -> None:
        """Opens the file, and makes it if there is none. Raises: ConfigError."""
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=5.0
            )
            path.chmod(0o600)
            self._prepare(path)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"spill.index: {path} cannot be opened: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def put(self, row: IndexedSpill) -> IndexedSpill | None:
        """Add a spill, in place of the context's earlier one, which is returned. Raises:
        SpillDiskFull, SpillUnavailable."""
        sealed = row.sealed
        with self._writing():
            earlier = self._rows(
                "tenant = ? AND context = ?", sealed.owner.tenant, sealed.owner.context
            )
            self._connection.execute(
                "DELETE FROM spills WHERE tenant = ? AND context = ?",
                (sealed.owner.tenant, sealed.owner.context),
            )
            self._connection.execute(
                "INSERT INTO spills VALUES (?, ?, ?, ?, ?, ?)",
                (
                    sealed.spill,
                    sealed.owner.tenant,
                    sealed.owner.context,
                    msgspec.msgpack.encode(sealed),
                    msgspec.msgpack.encode(row.receipts),
                    row.wrapped_key,
                ),
            )
        with suppress(SpillError):
            # It is committed, whatever becomes of the log: the next change moves that.
            self._forget_log()
        return earlier[0] if earlier else None

    def remove(self, spill: str) -> None:
        """Destroy a spill's key. Raises: SpillDiskFull, SpillUnavailable: then call it again, since
        the log may have the key."""
        with self._writing():
            self._connection.execute("DELETE FROM spills WHERE spill = ?", (spill,))
        self._forget_log()

    def find(self, spill: str) -> IndexedSpill | None:
        """Raises: SpillUnavailable."""
        with self._lock, _typed_errors():
            rows = self._rows("spill = ?", spill)
        return rows[0] if rows else None

    def read(self, tenant: TenantId | None = None) -> Sequence[IndexedSpill]:
        """Of one tenant or of all, oldest first. Raises: SpillUnavailable."""
        with self._lock, _typed_errors():
            return self._rows("true") if tenant is None else self._rows("tenant = ?", tenant)

    def _rows(self, where: str, *values: object) -> list[IndexedSpill]:
        query = f"SELECT {_COLUMNS} FROM spills WHERE {where} ORDER BY rowid"
        return [_row(*columns) for columns in self._connection.execute(query, values).fetchall()]

    def _prepare(self, path: Path) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (num_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if num_tables and (application, version) != (_APPLICATION_ID, _VERSION):
            raise ConfigError(f"spill.index: {path} is another program's or version's file")
        if num_tables:
            return
        with self._writing():
            for statement in filter(str.strip, _TABLES.split(";")):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, _typed_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def _forget_log(self) -> None:
        """Until then the write-ahead log has the keys that were removed."""
        with self._lock, _typed_errors():
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def wrap_key(key: bytes, sealed: SealedContext, receipts: object, keys: DataKeys) -> bytes:
    """The spill's key sealed under the tenant's, for this row and no other."""
    # A random nonce: far fewer spills than 2^32 are wrapped by one data key.
    nonce = secrets.token_bytes(_NONCE_BYTES)
    cipher = AESGCM(keys[sealed.key_version])
    return nonce + cipher.encrypt(nonce, key, msgspec.msgpack.encode(["spill", sealed, receipts]))


def unwrap_key(row: IndexedSpill, keys: DataKeys) -> bytes:
    """Raises: SealedCacheErased, SealedCacheDamaged."""
    key = keys.get(row.sealed.key_version)
    if key is None:
        raise SealedCacheErased(
            f"data key {row.sealed.key_version} of tenant {row.sealed.owner.tenant} was destroyed: "
            "compute the context again"
        )
    nonce, wrapped = row.wrapped_key[:_NONCE_BYTES], row.wrapped_key[_NONCE_BYTES:]
    text = msgspec.msgpack.encode(["spill", row.sealed, row.receipts])
    try:
        return AESGCM(key).decrypt(nonce, wrapped, text)
    except (InvalidTag, ValueError) as error:
        raise SealedCacheDamaged(
            f"what the index says of sealed cache {row.sealed.spill} was changed: compute the "
            "context again"
        ) from error


def newest_version(owner: SpillOwner, keys: DataKeys) -> int:
    """Raises: SealedCacheErased for a tenant without data key."""
    if not keys:
        raise SealedCacheErased(f"tenant {owner.tenant} has no data key, so nothing is written")
    return max(keys)


def tenant_of(sealed: SealedContext) -> tuple[TenantId, str]:
    return sealed.owner.tenant, sealed.owner.tenant_uid


def _row(
    spill: str, tenant: str, context: str, record: bytes, receipts: bytes, wrapped_key: bytes
) -> IndexedSpill:
    """One that cannot be read, or is not what its columns say, is damaged; no other suffers."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        row = IndexedSpill(
            msgspec.msgpack.decode(record, type=SealedContext),
            msgspec.msgpack.decode(receipts, type=tuple[PartReceipt, ...]),
            wrapped_key,
        )
        owner = row.sealed.owner
        if (row.sealed.spill, owner.tenant, owner.context) == (spill, tenant, context):
            return row
    sealed = SealedContext(
        spill=spill,
        owner=SpillOwner(tenant=TenantId(tenant), tenant_uid="", context=context),
        num_parts=0,
        num_bytes=0,
        key_version=0,
        create_time_s=0.0,
        is_damaged=True,
    )
    return IndexedSpill(sealed, (), b"")


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise SpillDiskFull("the index of sealed caches has no room on its disk") from error
        raise SpillUnavailable(
            f"the index of sealed caches cannot be read or written ({error})"
        ) from error
