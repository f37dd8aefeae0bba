"""The host tier keeps what the disk tier does, moves to it as it is, and leaves nothing behind.

Tests of `test_spill` that hold for both tiers run here on the host tier.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvcluster.cache.sealed_records import part_file
from kvcluster.cache.spill import DataKeys
from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.spill_folder import note_bytes
from kvcluster.cache.spill_host import SpillHost, zero_file
from kvcluster.cache.spill_parts import write_part
from kvcluster.errors import (
    SealedCacheDamaged,
    SealedCacheErased,
    SealedCacheUnknown,
    SpillUnavailable,
)
from tests.unit.cache.test_spill import (
    KEYS,
    PARTS,
    Disk,
    assert_whole,
    owner,
    test_a_file_that_was_changed_is_refused,
    test_a_newer_offload_replaces_the_older_and_what_is_not_committed_is_not_there,
    test_a_rank_reads_the_entries_that_it_asks_for_and_no_others,
    test_an_older_offload_of_the_same_context_is_refused_in_the_place_of_the_newer,
    test_another_attempt_at_a_part_is_not_taken_for_the_committed_one,
    test_bytes_are_counted_as_they_are_on_the_disk_and_told_before_they_are_written,
    test_every_single_byte_counts,
    test_files_of_two_tenants_contexts_or_parts_that_change_places_are_refused,
    test_not_yours_and_not_there_get_one_answer,
    test_nothing_of_the_cache_nor_of_its_owner_is_in_the_folder,
    test_parts_that_are_missing_doubled_or_of_another_size_are_not_committed,
    test_without_its_data_key_a_spill_cannot_be_read_nor_with_another_tenants,
)

__all__ = [
    "test_a_file_that_was_changed_is_refused",
    "test_a_newer_offload_replaces_the_older_and_what_is_not_committed_is_not_there",
    "test_a_rank_reads_the_entries_that_it_asks_for_and_no_others",
    "test_an_older_offload_of_the_same_context_is_refused_in_the_place_of_the_newer",
    "test_another_attempt_at_a_part_is_not_taken_for_the_committed_one",
    "test_bytes_are_counted_as_they_are_on_the_disk_and_told_before_they_are_written",
    "test_every_single_byte_counts",
    "test_files_of_two_tenants_contexts_or_parts_that_change_places_are_refused",
    "test_not_yours_and_not_there_get_one_answer",
    "test_nothing_of_the_cache_nor_of_its_owner_is_in_the_folder",
    "test_parts_that_are_missing_doubled_or_of_another_size_are_not_committed",
    "test_without_its_data_key_a_spill_cannot_be_read_nor_with_another_tenants",
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "memory"
    folder.mkdir()
    tier = SpillHost(folder, unix_time=lambda: 5.0)
    yield Disk(tier, folder, tmp_path / "none")
    tier.close()


@pytest.fixture
def real_disk(tmp_path: Path) -> Iterator[Disk]:
    folder, index = tmp_path / "disk", tmp_path / "index.sqlite"
    tier = SpillDisk(folder, index, unix_time=lambda: 6.0)
    yield Disk(tier, folder, index)
    tier.close()


def test_what_is_deleted_is_zero_for_whoever_still_has_it_open(disk: Disk) -> None:
    sealed = disk.offload(owner())
    before = disk.file(sealed).read_bytes()
    with disk.file(sealed).open("rb") as kept:
        disk.tier.delete(sealed.owner, sealed.spill)
        after = kept.read()

    assert len(before) == len(after) > 0
    assert before.count(0) < len(before) / 2
    assert not any(after)
    assert list(disk.folder.iterdir()) == []


def test_a_close_zeroes_and_removes_everything(disk: Disk) -> None:
    files = [disk.file(disk.offload(owner(context=name))) for name in ("c1", "c2")]
    kept = [file.open("rb") for file in files]
    disk.tier.close()

    assert list(disk.folder.iterdir()) == []
    for file in kept:
        assert not any(file.read())
        file.close()


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 3 * 1024 * 1024 + 5])
def test_a_file_of_any_size_is_zeroed_to_its_end_and_keeps_its_size(
    size: int, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\1" * size)

    zero_file(file)

    assert file.read_bytes() == bytes(size)


@pytest.mark.parametrize("is_up", [False, True], ids=["to disk", "to host"])
def test_a_context_moves_between_the_tiers_as_it_is_sealed(
    is_up: bool, disk: Disk, real_disk: Disk
) -> None:
    source, target = (real_disk, disk) if is_up else (disk, real_disk)
    sealed = source.offload(owner())
    records = source.file(sealed).read_bytes()
    ticket = source.tier.open(sealed.owner, sealed.spill, KEYS)

    moved = target.tier.adopt(ticket, KEYS, note=b"note")
    source.tier.delete(sealed.owner, sealed.spill)

    assert target.file(moved).read_bytes() == records
    assert_whole(target.restore(moved))
    assert target.tier.read_note(moved.owner, moved.spill, KEYS) == b"note"
    assert moved.num_bytes == target.bytes_there()
    assert moved.num_bytes == sealed.num_bytes - note_bytes(0) + note_bytes(4)
    assert source.bytes_there() == 0


def test_a_move_replaces_what_the_other_tier_had_of_the_context(
    disk: Disk, real_disk: Disk
) -> None:
    earlier = real_disk.offload(owner(), PARTS[:1])
    sealed = disk.offload(owner())

    moved = real_disk.tier.adopt(disk.tier.open(owner(), sealed.spill, KEYS), KEYS)

    assert real_disk.tier.listed() == [moved]
    assert real_disk.bytes_there() == moved.num_bytes
    with pytest.raises(SealedCacheUnknown):
        real_disk.restore(earlier)


def test_what_was_changed_before_it_moved_is_refused_afterwards(
    disk: Disk, real_disk: Disk
) -> None:
    sealed = disk.offload(owner())
    content = bytearray(disk.file(sealed).read_bytes())
    content[-40] ^= 1
    disk.file(sealed).write_bytes(content)
    ticket = disk.tier.open(owner(), sealed.spill, KEYS)

    moved = real_disk.tier.adopt(ticket, KEYS)

    with pytest.raises(SealedCacheDamaged):
        real_disk.restore(moved)


@pytest.mark.parametrize("keys", [{}, {3: bytes(32)}], ids=["no key", "another key"])
def test_a_move_needs_the_tenants_key_of_now(keys: DataKeys, disk: Disk, real_disk: Disk) -> None:
    sealed = disk.offload(owner())
    ticket = disk.tier.open(owner(), sealed.spill, KEYS)
    if not keys:
        with pytest.raises(SealedCacheErased):
            real_disk.tier.adopt(ticket, keys)
        assert real_disk.tier.listed() == []
        return
    moved = real_disk.tier.adopt(ticket, keys)

    assert moved.key_version == 3
    assert_whole(real_disk.restore(moved, keys))
    with pytest.raises(SealedCacheErased):
        real_disk.restore(moved, KEYS)


def test_a_move_that_fails_leaves_nothing_new(disk: Disk, real_disk: Disk) -> None:
    sealed = disk.offload(owner())
    ticket = disk.tier.open(owner(), sealed.spill, KEYS)
    part_file(ticket, 1).unlink()

    with pytest.raises(SealedCacheDamaged):
        real_disk.tier.adopt(ticket, KEYS)

    assert real_disk.tier.listed() == []
    assert list(real_disk.folder.iterdir()) == []
    disk.file(sealed, 1).touch()
    with pytest.raises(SealedCacheDamaged):
        real_disk.tier.adopt(ticket, KEYS)
    assert list(real_disk.folder.iterdir()) == []


def test_a_rank_that_does_not_see_the_folder_says_so(disk: Disk) -> None:
    """One on another machine."""
    ticket = disk.tier.begin(owner(), KEYS, num_parts=1)
    elsewhere = msgspec.structs.replace(ticket, folder=ticket.folder + "-elsewhere")

    with pytest.raises(SpillUnavailable, match="No such file or directory"):
        write_part(elsewhere, 0, PARTS[0])
    disk.tier.abandon(ticket)
    assert list(disk.folder.iterdir()) == []
