"""A spill's note is replaced from one moment to the next, and its parts stay what they are."""

from pathlib import Path

import pytest

from kvcluster.cache.spill_folder import note_bytes
from kvcluster.errors import SealedCacheDamaged, SealedCacheErased, SealedCacheUnknown
from tests.unit.cache.test_spill import KEYS, Disk, assert_whole, disk, owner, reopened

__all__ = ["disk"]


def noted(disk: Disk, note: bytes) -> bytes:
    (sealed,) = disk.tier.listed()
    return disk.tier.read_note(sealed.owner, sealed.spill, KEYS)[: len(note)]


def test_the_last_note_is_read_after_a_restart_and_every_byte_is_counted(disk: Disk) -> None:
    sealed = disk.offload(owner())
    for note in (b"first", b"the second, which is longer", b"3"):
        replaced = disk.tier.replace_note(sealed.owner, sealed.spill, KEYS, note)
        assert noted(disk, note) == note
        assert replaced.num_bytes == disk.bytes_there()
        assert replaced.num_bytes == sealed.num_bytes - note_bytes(0) + note_bytes(len(note))

    again = reopened(disk)

    assert noted(again, b"3") == b"3"
    (found,) = again.tier.listed()
    assert_whole(again.restore(found))
    again.tier.close()


def test_the_newest_key_seals_what_has_a_new_note(disk: Disk) -> None:
    sealed = disk.offload(owner(), keys={1: KEYS[1]})
    replaced = disk.tier.replace_note(sealed.owner, sealed.spill, KEYS, b"note")

    assert (sealed.key_version, replaced.key_version) == (1, 2)
    assert_whole(disk.restore(replaced, {2: KEYS[2]}))
    with pytest.raises(SealedCacheErased):
        disk.restore(replaced, {1: KEYS[1]})


def test_a_note_that_was_put_back_is_refused(disk: Disk) -> None:
    sealed = disk.offload(owner())
    disk.tier.replace_note(sealed.owner, sealed.spill, KEYS, b"older")
    disk.tier.replace_note(sealed.owner, sealed.spill, KEYS, b"newer")
    current = disk.file(sealed, sealed.num_parts)
    newer = current.read_bytes()
    disk.tier.replace_note(sealed.owner, sealed.spill, KEYS, b"other")
    disk.tier.replace_note(sealed.owner, sealed.spill, KEYS, b"again")
    current.write_bytes(newer)

    with pytest.raises(SealedCacheDamaged):
        disk.tier.read_note(sealed.owner, sealed.spill, KEYS)


def test_nobody_replaces_the_note_of_another(disk: Disk) -> None:
    sealed = disk.offload(owner())

    with pytest.raises(SealedCacheUnknown):
        disk.tier.replace_note(owner(tenant="blue"), sealed.spill, KEYS, b"mine")
    with pytest.raises(SealedCacheErased):
        disk.tier.replace_note(sealed.owner, sealed.spill, {3: bytes(32)}, b"mine")


def test_a_file_that_a_kill_left_beside_is_swept_and_the_note_is_the_old_one(disk: Disk) -> None:
    sealed = disk.offload(owner())
    disk.tier.replace_note(sealed.owner, sealed.spill, KEYS, b"kept")
    left: Path = disk.file(sealed, sealed.num_parts)
    assert not left.exists(), "the note has its other name now"
    left.write_bytes(b"half of a note that was to come next")

    again = reopened(disk)

    assert not left.exists()
    assert noted(again, b"kept") == b"kept"
    again.tier.close()
