"""Sealed contexts in a folder: implements `spill.SpillTier`, in the engine's process.

One class for both tiers off the GPUs, which differ in where the folder is, in who keeps the index,
and in what is done to a file before it goes: `spill_disk` and `spill_host`. A spill has a folder of
its own under a random name, which tells nothing of its owner. It exists once its row is in the
index; what a crash leaves without a row is swept at the next start. Every machine with a rank has
to see the folder at the same path.
"""

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from kvcluster.cache.sealed_files import copy_sealed, disk_errors, open_sealed, write_sealed
from kvcluster.cache.sealed_records import (
    KEY_BYTES,
    PartHeader,
    RecordPlace,
    part_file,
    part_name,
    sealed_bytes,
)
from kvcluster.cache.spill import (
    DataKeys,
    PartReceipt,
    SealedContext,
    SpillOwner,
    SpillTicket,
)
from kvcluster.cache.spill_index import (
    IndexedSpill,
    newest_version,
    unwrap_key,
    wrap_key,
)
from kvcluster.errors import SealedCacheDamaged, SealedCacheUnknown, SpillError
from kvcluster.types import TenantId

_SPILL_BYTES = 16


class SpillRows(Protocol):
    """The committed spills of one folder. Methods may be called from any thread; all raise
    SpillUnavailable when the rows cannot be read or written."""

    def put(self, row: IndexedSpill) -> IndexedSpill | None:
        """Add a spill, in place of the context's earlier one, which is returned."""
        ...

    def remove(self, spill: str) -> None:
        """Destroy a spill's key. Where it raises, call it again."""
        ...

    def find(self, spill: str) -> IndexedSpill | None: ...

    def read(self, tenant: TenantId | None = None) -> Sequence[IndexedSpill]:
        """Of one tenant or of all, oldest first."""
        ...

    def close(self) -> None: ...


class SpillFolder:
    """One for a cluster. Usable from any thread."""

    def __init__(
        self,
        folder: Path,
        index: SpillRows,
        *,
        unix_time: Callable[[], float] = time.time,
        wipe: Callable[[Path], None] = lambda _file: None,
    ) -> None:
        """Sweeps what was not committed. `wipe`: done to each file before it is removed.

        Raises: SpillUnavailable.
        """
        self._folder = folder
        self._unix_time = unix_time
        self._wipe = wipe
        self._index = index
        self._begun: set[str] = set()
        self._deleted: dict[str, SpillOwner] = {}
        """Spills whose deletion broke off."""
        self._left: set[Path] = set()
        """What the index knows no more, and could not be removed yet."""
        self._removing = threading.Lock()
        self._sweep()

    def close(self) -> None:
        self._index.close()

    def begin(self, owner: SpillOwner, keys: DataKeys, *, num_parts: int) -> SpillTicket:
        newest_version(owner, keys)
        spill = secrets.token_hex(_SPILL_BYTES)
        return SpillTicket(
            spill=spill,
            owner=owner,
            folder=str(self._begin(spill)),
            key=secrets.token_bytes(KEY_BYTES),
            num_parts=num_parts,
        )

    def adopt(self, ticket: SpillTicket, keys: DataKeys, *, note: bytes = b"") -> SealedContext:
        newest_version(ticket.owner, keys)
        copy = msgspec.structs.replace(ticket, folder=str(self._begin(ticket.spill)))
        try:
            for receipt in ticket.receipts:
                copy_sealed(ticket, copy, receipt)
            return self.commit(copy, ticket.receipts, keys, note=note)
        except BaseException:
            # What cannot be removed now is swept at the next start.
            with suppress(SpillError):
                self.abandon(copy)
            raise

    def _begin(self, spill: str) -> Path:
        folder = self._folder / spill
        with disk_errors("written"):
            folder.mkdir(mode=0o700)
        self._begun.add(spill)
        return folder

    def commit(
        self,
        ticket: SpillTicket,
        receipts: Sequence[PartReceipt],
        keys: DataKeys,
        *,
        note: bytes = b"",
    ) -> SealedContext:
        given = tuple(sorted(receipts, key=lambda receipt: receipt.part))
        if ticket.spill not in self._begun:
            raise SealedCacheDamaged(f"spill {ticket.spill} is not being written: begin again")
        if [receipt.part for receipt in given] != list(range(ticket.num_parts)):
            raise SealedCacheDamaged(f"spill {ticket.spill} lacks a part: begin again")
        given = (*given, _write_note(ticket, note))
        sealed = SealedContext(
            spill=ticket.spill,
            owner=ticket.owner,
            num_parts=ticket.num_parts,
            num_bytes=sum(receipt.num_bytes for receipt in given),
            key_version=newest_version(ticket.owner, keys),
            create_time_s=self._unix_time(),
        )
        self._check_written(ticket, given)
        wrapped = wrap_key(ticket.key, sealed, given, keys)
        earlier = self._index.put(IndexedSpill(sealed, given, wrapped))
        self._begun.discard(ticket.spill)
        self._remove_left(*(self._folder / each.sealed.spill for each in (earlier,) if each))
        return sealed

    def abandon(self, ticket: SpillTicket) -> None:
        if ticket.spill in self._begun:
            self._begun.discard(ticket.spill)
            self._remove_files(self._folder / ticket.spill)

    def open(self, owner: SpillOwner, spill: str, keys: DataKeys) -> SpillTicket:
        row = self._own(owner, spill)
        return self._ticket(row, keys, row.receipts[: row.sealed.num_parts])

    def read_note(self, owner: SpillOwner, spill: str, keys: DataKeys) -> bytes:
        row = self._own(owner, spill)
        reader = open_sealed(self._ticket(row, keys, ()), row.receipts[-1])
        try:
            with disk_errors("read"):
                return reader.read(0)
        finally:
            reader.close()

    def replace_note(
        self, owner: SpillOwner, spill: str, keys: DataKeys, note: bytes
    ) -> SealedContext:
        row = self._own(owner, spill)
        ticket, before = self._ticket(row, keys, ()), row.receipts[-1]
        # The two have names of their own, so that a crash leaves the one that the index knows.
        is_second = before.part == ticket.num_parts
        with self._removing:
            self._left.discard(part_file(ticket, ticket.num_parts + is_second))
        after = _write_note(ticket, note, is_second=is_second)
        sealed = msgspec.structs.replace(
            row.sealed,
            num_bytes=row.sealed.num_bytes - before.num_bytes + after.num_bytes,
            key_version=newest_version(owner, keys),
        )
        receipts = (*row.receipts[:-1], after)
        self._index.put(
            IndexedSpill(sealed, receipts, wrap_key(ticket.key, sealed, receipts, keys))
        )
        self._remove_left(part_file(ticket, before.part))
        return sealed

    def _ticket(
        self, row: IndexedSpill, keys: DataKeys, receipts: tuple[PartReceipt, ...]
    ) -> SpillTicket:
        spill = row.sealed.spill
        if row.sealed.is_damaged:
            raise SealedCacheDamaged(
                f"the row of sealed cache {spill} in the index was changed: compute the context "
                "again"
            )
        return SpillTicket(
            spill=spill,
            owner=row.sealed.owner,
            folder=str(self._folder / spill),
            key=unwrap_key(row, keys),
            num_parts=row.sealed.num_parts,
            receipts=receipts,
        )

    def delete(self, owner: SpillOwner, spill: str) -> None:
        if self._deleted.get(spill) != owner:
            self._own(owner, spill)
        self._deleted[spill] = owner
        # First the key: a crash in between leaves files that open with nothing, to be swept.
        self._index.remove(spill)
        self._remove_files(self._folder / spill)
        del self._deleted[spill]

    def delete_all(self, tenant: TenantId, tenant_uid: str) -> int:
        doomed = [one for one in self.listed(tenant) if one.owner.tenant_uid == tenant_uid]
        for sealed in doomed:
            self.delete(sealed.owner, sealed.spill)
        return len(doomed)

    def listed(self, tenant: TenantId | None = None) -> Sequence[SealedContext]:
        return [self._measured(row.sealed) for row in self._index.read(tenant)]

    def _measured(self, sealed: SealedContext) -> SealedContext:
        """With the bytes that are there, where the index does not know them."""
        if not sealed.is_damaged:
            return sealed
        with disk_errors("read"):
            files = (self._folder / sealed.spill).glob("*")
            num_bytes = sum(file.stat().st_size for file in files)
        return msgspec.structs.replace(sealed, num_bytes=num_bytes)

    def used_bytes(self, tenant: TenantId) -> int:
        return sum(sealed.num_bytes for sealed in self.listed(tenant))

    def _own(self, owner: SpillOwner, spill: str) -> IndexedSpill:
        row = self._index.find(spill)
        # One answer for both: whether another tenant has it is not told.
        if row is None or row.sealed.owner != owner:
            raise SealedCacheUnknown(f"there is no sealed cache {spill} of this context")
        return row

    def _check_written(self, ticket: SpillTicket, receipts: Sequence[PartReceipt]) -> None:
        for receipt in receipts:
            file = part_file(ticket, receipt.part)
            with disk_errors("read"):
                if not file.is_file() or file.stat().st_size != receipt.num_bytes:
                    raise SealedCacheDamaged(f"{file.name} of spill {ticket.spill} is not there")

    def _sweep(self) -> None:
        rows = {row.sealed.spill: row for row in self._index.read()}
        with disk_errors("read"):
            found = [entry for entry in self._folder.iterdir() if entry.is_dir()]
        for entry in found:
            is_ours = len(entry.name) == 2 * _SPILL_BYTES and entry.name.isalnum()
            if is_ours and entry.name not in rows:
                self._remove_files(entry)
        for spill, row in rows.items():
            if not row.sealed.is_damaged:
                self._remove_other_files(spill, row.receipts)

    def _remove_other_files(self, spill: str, receipts: Sequence[PartReceipt]) -> None:
        """A note that was replaced, or was to replace one, when the process was killed."""
        files = {part_name(receipt.part) for receipt in receipts}
        with disk_errors("written"):
            for file in (self._folder / spill).glob("*"):
                if file.name not in files:
                    self._remove_file(file)

    def _remove_left(self, *paths: Path) -> None:
        """Remove these folders and files, and those that could not be removed before, as far as
        that can be done now: what is committed does not depend on it."""
        with self._removing:
            self._left.update(paths)
            for path in tuple(self._left):
                with suppress(SpillError):
                    self._remove_files(path)
                    self._left.discard(path)

    def _remove_files(self, path: Path) -> None:
        """A folder with all that is in it, or a file. Again changes nothing. Raises:
        SpillUnavailable."""
        with disk_errors("written"):
            self._remove_file(path)
            for file in path.glob("*"):
                self._remove_file(file)
            if path.is_dir():
                shutil.rmtree(path)

    def _remove_file(self, file: Path) -> None:
        if file.is_file():
            self._wipe(file)
            file.unlink()


def _write_note(ticket: SpillTicket, note: bytes, *, is_second: bool = False) -> PartReceipt:
    """As one more file, after those of the ranks. Raises: SpillDiskFull, SpillUnavailable."""
    part = ticket.num_parts + is_second
    return write_sealed(ticket, part, _note_header(len(note)), (note,))


def note_bytes(length: int) -> int:
    """Bytes of the file that a note of such a length becomes, exactly."""
    return sealed_bytes(_note_header(length))


def _note_header(length: int) -> PartHeader:
    return PartHeader(content=b"", places=(RecordPlace("note", 0, 0, length),))
