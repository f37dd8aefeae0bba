"""A disk that fails between two steps: what was committed is there, what is deleted can be deleted
again, and nothing is forgotten on the disk."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.spill_index import SpillIndex
from kvcluster.errors import SealedCacheUnknown, SpillUnavailable
from tests.unit.cache.test_spill import KEYS, Disk, assert_whole, disk, owner, reopened

__all__ = ["disk"]


class FailingCheckpoints:
    """A connection that commits, and has no room to move its log into the file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.are_failing = True

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if self.are_failing and "wal_checkpoint" in statement:
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def failing_checkpoints(tier: SpillDisk) -> FailingCheckpoints:
    index = tier._index
    assert isinstance(index, SpillIndex)
    failing = FailingCheckpoints(index._connection)
    index._connection = failing  # type: ignore[assignment]
    return failing


class FailingRemoval:
    """No file can be removed while it fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_failing = True
        unlink = Path.unlink

        def failing(path: Path, *, missing_ok: bool = False) -> None:
            if self.is_failing and path.suffix == ".sealed":
                raise OSError(5, "Input/output error")
            unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "unlink", failing)


def folders(disk: Disk) -> set[str]:
    return {entry.name for entry in disk.folder.iterdir()}


def test_what_the_index_has_committed_is_kept_though_its_log_stays(disk: Disk) -> None:
    earlier = disk.offload(owner())
    failing = failing_checkpoints(disk.tier)
    sealed = disk.offload(owner())

    assert disk.tier.listed() == [sealed]
    assert_whole(disk.restore(sealed))
    failing.are_failing = False
    disk.offload(owner(context="c2"))
    # The key of the earlier one is in neither file now.
    assert Path(f"{disk.index}-wal").stat().st_size == 0
    assert earlier.spill.encode() not in disk.index.read_bytes()
    assert_whole(reopened(disk).restore(sealed))


def test_a_deletion_whose_key_is_still_in_the_log_is_not_done_and_can_be_repeated(
    disk: Disk,
) -> None:
    sealed = disk.offload(owner())
    failing = failing_checkpoints(disk.tier)
    with pytest.raises(SpillUnavailable):
        disk.tier.delete(owner(), sealed.spill)
    with pytest.raises(SealedCacheUnknown):
        disk.tier.delete(owner("blue"), sealed.spill)
    failing.are_failing = False
    disk.tier.delete(owner(), sealed.spill)

    assert Path(f"{disk.index}-wal").stat().st_size == 0
    assert folders(disk) == set()
    with pytest.raises(SealedCacheUnknown):
        disk.tier.delete(owner(), sealed.spill)


def test_files_that_could_not_be_removed_are_when_the_deletion_is_repeated(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = disk.offload(owner())
    failing = FailingRemoval(monkeypatch)
    with pytest.raises(SpillUnavailable):
        disk.tier.delete(owner(), sealed.spill)
    assert folders(disk) == {sealed.spill}
    failing.is_failing = False
    disk.tier.delete(owner(), sealed.spill)

    assert folders(disk) == set()


def test_an_offload_is_committed_though_the_earlier_one_cannot_be_removed_yet(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = disk.offload(owner())
    failing = FailingRemoval(monkeypatch)
    sealed = disk.offload(owner())
    assert disk.tier.listed() == [sealed]
    assert_whole(disk.restore(sealed))
    assert folders(disk) == {earlier.spill, sealed.spill}
    failing.is_failing = False
    other = disk.offload(owner(context="c2"))

    assert folders(disk) == {sealed.spill, other.spill}


def test_a_note_is_replaced_though_the_one_before_cannot_be_removed_yet(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = disk.offload(owner())
    failing = FailingRemoval(monkeypatch)
    renamed = disk.tier.replace_note(owner(), sealed.spill, KEYS, b"a longer note")
    assert renamed == disk.tier.listed()[0]
    assert disk.tier.read_note(owner(), sealed.spill, KEYS) == b"a longer note"
    failing.is_failing = False
    again = disk.tier.replace_note(owner(), sealed.spill, KEYS, b"short")

    assert disk.bytes_there() == again.num_bytes
    assert disk.tier.read_note(owner(), sealed.spill, KEYS) == b"short"
