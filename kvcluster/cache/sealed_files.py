"""Sealed files of a spill on the disk: written whole or not at all, opened by their receipts."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from kvcluster.cache.sealed_records import PartHeader, PartReader, PartWriter, part_file, part_of
from kvcluster.cache.spill import PartReceipt, SpillTicket
from kvcluster.errors import SealedCacheDamaged, SpillDiskFull, SpillUnavailable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPIED_AT_ONCE: Final = 4 * 1024 * 1024


def write_sealed(
    ticket: SpillTicket, part: int, header: PartHeader, contents: Iterable[bytes]
) -> PartReceipt:
    """Write a file with one record for each of the header's places; on return it is on the disk.

    Raises: SpillDiskFull, SpillUnavailable; no file is left then.
    """
    with _whole_file(part_file(ticket, part)) as raw:
        writer = PartWriter(raw, ticket.key, part_of(ticket, part), header)
        for content in contents:
            writer.add(content)
        num_bytes = writer.finish()
    return PartReceipt(part=part, num_bytes=num_bytes, salt=writer.salt)


def copy_sealed(ticket: SpillTicket, to: SpillTicket, receipt: PartReceipt) -> None:
    """Copy a file as it is, records unopened; on return the copy is on the disk. What was changed
    in it is found by whoever reads the copy.

    Raises: SealedCacheDamaged when it is missing, SpillDiskFull, SpillUnavailable; no file is left
    then.
    """
    with disk_errors("read"):
        source = part_file(ticket, receipt.part).open("rb")
    with source, _whole_file(part_file(to, receipt.part)) as raw:
        shutil.copyfileobj(source, raw, _COPIED_AT_ONCE)
        raw.flush()
        os.fsync(raw.fileno())


def open_sealed(ticket: SpillTicket, receipt: PartReceipt) -> PartReader:
    """To be closed by the caller. Raises: SealedCacheDamaged, SpillUnavailable."""
    place = part_of(ticket, receipt.part)
    with disk_errors("read"):
        return PartReader(part_file(ticket, receipt.part), ticket.key, place, receipt.salt)


@contextmanager
def disk_errors(verb: str) -> Iterator[None]:
    """Turns OSError into SpillDiskFull or SpillUnavailable; a file that is missing, into
    SealedCacheDamaged where it was to be read."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise SpillDiskFull(
                "no room on the disk of spilled contexts: delete some, or make room"
            ) from error
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise SealedCacheDamaged("a file of the sealed cache is missing") from error
        raise SpillUnavailable(
            f"the disk of spilled contexts cannot be {verb} ({error.strerror}): look at it"
        ) from error


@contextmanager
def _whole_file(file: Path) -> Iterator[BinaryIO]:
    """A new file that has its name once it is written: by then the block has synced it."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with disk_errors("written"):
        try:
            with partial.open("xb") as raw:
                partial.chmod(0o600)
                yield raw
            partial.replace(file)
            _sync_folder(file.parent)
        finally:
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
