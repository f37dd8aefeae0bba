"""The sealed disk tier: what is written comes back, and whatever is done to the files is found."""

import os
import resource
import secrets
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch

from kvcluster.cache.saved import HeldEntries, SavedCache, SavedHeader, StoredForm
from kvcluster.cache.sealed_records import part_file
from kvcluster.cache.spill import DataKeys, PartReceipt, SealedContext, SpillOwner, SpillTicket
from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.spill_folder import note_bytes
from kvcluster.cache.spill_parts import part_bytes, read_parts, write_part
from kvcluster.errors import (
    ConfigError,
    SealedCacheDamaged,
    SealedCacheErased,
    SealedCacheUnknown,
    SpillDiskFull,
    SpillUnavailable,
)
from kvcluster.types import TenantId

ROOT = Path(__file__).parents[3]
KEYS: DataKeys = {1: bytes(range(32)), 2: bytes(range(32, 64))}
OTHER_KEYS: DataKeys = {1: bytes(32), 2: bytes([7]) * 32}
BLOCK_SIZE = 4
NUM_TOKENS = 22
CANARY = 0.777


def owner(tenant: str = "red", context: str = "c1", uid: str = "u1") -> SpillOwner:
    return SpillOwner(tenant=TenantId(tenant), tenant_uid=uid, context=context)


def part(exact: tuple[int, ...], encoded: tuple[int, ...], *, seed: int = 0) -> SavedCache:
    """What one rank holds: one KV group, two layers, keys and values and one encoded plane."""
    random = torch.Generator().manual_seed(seed)
    form = StoredForm(
        weights_digest="w",
        dtype="float32",
        windows=(None,),
        block_size=BLOCK_SIZE,
        codec="int4",
        calibration_digest="",
        exact_blocks=1,
    )
    header = SavedHeader(
        format_version=1, form=form, num_tokens=NUM_TOKENS, groups=(HeldEntries(exact, encoded),)
    )
    num_exact = sum(min(BLOCK_SIZE, NUM_TOKENS - entry * BLOCK_SIZE) for entry in exact)
    tensors = {}
    for layer in range(2):
        for array in ("keys", "values"):
            tensors[f"0.{layer}.exact.{array}"] = torch.rand(num_exact, 2, 3, generator=random)
        codes = torch.randint(0, 255, (len(encoded), 5), generator=random, dtype=torch.uint8)
        tensors[f"0.{layer}.encoded.0"] = codes
        scales = torch.rand(len(encoded), 2, generator=random).to(torch.bfloat16)
        tensors[f"0.{layer}.encoded.1"] = scales
    tensors["0.0.exact.keys"][:] = CANARY
    return SavedCache(header, tensors)


PARTS = (part((0,), (1, 3), seed=1), part((4, 5), (2,), seed=2))


class Disk(NamedTuple):
    tier: SpillDisk
    folder: Path
    index: Path

    def offload(
        self, of: SpillOwner, parts: tuple[SavedCache, ...] = PARTS, keys: DataKeys = KEYS
    ) -> SealedContext:
        ticket = self.tier.begin(of, keys, num_parts=len(parts))
        receipts = [write_part(ticket, rank, saved) for rank, saved in enumerate(parts)]
        return self.tier.commit(ticket, receipts, keys)

    def restore(self, sealed: SealedContext, keys: DataKeys = KEYS) -> SavedCache:
        return read_parts(self.tier.open(sealed.owner, sealed.spill, keys))

    def file(self, sealed: SealedContext, number: int = 0) -> Path:
        return self.folder / sealed.spill / f"part-{number:05d}.sealed"

    def bytes_there(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*.sealed"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder, index = tmp_path / "spill", tmp_path / "index.sqlite"
    tier = SpillDisk(folder, index, unix_time=lambda: 5.0)
    yield Disk(tier, folder, index)
    tier.close()


def reopened(disk: Disk) -> Disk:
    disk.tier.close()
    return disk._replace(tier=SpillDisk(disk.folder, disk.index))


def assert_whole(found: SavedCache) -> None:
    """The entries of both parts, ascending, with the bytes of each."""
    assert found.header.groups == (HeldEntries((0, 4, 5), (1, 2, 3)),)
    for layer in range(2):
        exact, encoded = f"0.{layer}.exact.keys", f"0.{layer}.encoded.1"
        first, second = (saved.tensors[exact] for saved in PARTS)
        assert torch.equal(found.tensors[exact], torch.cat([first, second]))
        first, second = (saved.tensors[encoded] for saved in PARTS)
        assert torch.equal(found.tensors[encoded], torch.stack([first[0], second[0], first[1]]))
        assert found.tensors[encoded].dtype == torch.bfloat16


def test_what_several_ranks_write_is_read_as_one_also_after_a_restart(disk: Disk) -> None:
    sealed = disk.offload(owner())
    assert_whole(disk.restore(sealed))
    again = reopened(disk)

    assert again.tier.listed() == [sealed]
    assert_whole(again.restore(sealed))
    again.tier.close()


def test_a_rank_reads_the_entries_that_it_asks_for_and_no_others(disk: Disk) -> None:
    sealed = disk.offload(owner())
    ticket = disk.tier.open(owner(), sealed.spill, KEYS)

    found = read_parts(ticket, [HeldEntries((5,), (3, 2))])

    assert found.header.groups == (HeldEntries((5,), (3, 2)),)
    assert torch.equal(found.tensors["0.1.exact.values"], PARTS[1].tensors["0.1.exact.values"][4:])
    expected = [PARTS[0].tensors["0.0.encoded.0"][1], PARTS[1].tensors["0.0.encoded.0"][0]]
    assert torch.equal(found.tensors["0.0.encoded.0"], torch.stack(expected))
    with pytest.raises(SealedCacheDamaged, match="entry 9"):
        read_parts(ticket, [HeldEntries((9,), ())])


def test_a_rank_that_holds_nothing_writes_a_part_too(disk: Disk) -> None:
    sealed = disk.offload(owner(), (*PARTS, part((), ())))

    assert_whole(disk.restore(sealed))


def test_bytes_are_counted_as_they_are_on_the_disk_and_told_before_they_are_written(
    disk: Disk,
) -> None:
    told = sum(map(part_bytes, PARTS)) + note_bytes(0)
    red = [disk.offload(owner(context=f"c{number}")) for number in range(3)]
    blue = disk.offload(owner("blue", uid="u2"), PARTS[:1])

    assert {sealed.num_bytes for sealed in red} == {told}
    assert disk.tier.used_bytes(TenantId("red")) == 3 * told
    assert disk.tier.used_bytes(TenantId("blue")) == part_bytes(PARTS[0]) + note_bytes(0)
    assert disk.bytes_there() == 3 * told + part_bytes(PARTS[0]) + note_bytes(0)
    disk.tier.delete(red[0].owner, red[0].spill)
    assert disk.tier.used_bytes(TenantId("red")) == 2 * told
    assert disk.tier.delete_all(TenantId("blue"), "another uid") == 0
    assert disk.tier.delete_all(TenantId("blue"), "u2") == 1
    assert disk.bytes_there() == 2 * told
    assert blue.spill not in {entry.name for entry in disk.folder.iterdir()}


def test_nothing_of_the_cache_nor_of_its_owner_is_in_the_folder(disk: Disk) -> None:
    sealed = disk.offload(owner("red-tenant", "secret-context"))
    canary = torch.full((2,), CANARY).numpy().tobytes()
    assert canary in PARTS[0].tensors["0.0.exact.keys"].numpy().tobytes()
    there = b"".join(file.read_bytes() for file in disk.folder.rglob("*") if file.is_file())
    names = " ".join(str(file) for file in disk.folder.rglob("*"))

    for text in (canary, b"red-tenant", b"secret-context", b"exact.keys", KEYS[2]):
        assert text not in there
    assert "red" not in names.removeprefix(str(disk.folder))
    assert disk.file(sealed).stat().st_mode & 0o777 == 0o600


def test_equal_contexts_are_different_files(disk: Disk) -> None:
    """No file tells that two tenants, or one twice, hold the same."""
    one, two = disk.offload(owner()), disk.offload(owner(context="c2"))
    first, second = disk.file(one).read_bytes(), disk.file(two).read_bytes()

    assert len(first) == len(second)
    equal = sum(a == b for a, b in zip(first, second, strict=True))
    # By chance one byte in 256; the magic and the length's zeros are equal.
    assert equal < len(first) / 20


def flip(at: int) -> Callable[[Path], None]:
    def tamper(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)

    return tamper


def truncate(count: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, file.stat().st_size - count)


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def reorder(file: Path) -> None:
    """The two encoded records of part 0 are of one length: change places."""
    content = file.read_bytes()
    length = (len(content) - _records_start(content) - _exact_bytes()) // 2
    at = len(content) - 2 * length
    file.write_bytes(content[:at] + content[at + length :] + content[at : at + length])


def _records_start(content: bytes) -> int:
    return 48 + int.from_bytes(content[40:48], "big")


def _exact_bytes() -> int:
    return 2 * 2 * BLOCK_SIZE * 2 * 3 * 4 + 16


@pytest.mark.parametrize(
    "tamper",
    [
        *(flip(at) for at in (0, 8, 39, 40, 47, 48, 100, -1, -17, -60)),
        *(truncate(count) for count in (1, 16, 17, 500)),
        lambda file: os.truncate(file, 0),
        append,
        reorder,
        Path.unlink,
        lambda file: file.write_bytes(secrets.token_bytes(4096)),
    ],
)
def test_a_file_that_was_changed_is_refused(tamper: Callable[[Path], None], disk: Disk) -> None:
    sealed = disk.offload(owner())
    before = disk.file(sealed).read_bytes() if disk.file(sealed).exists() else b""
    tamper(disk.file(sealed))
    assert not disk.file(sealed).exists() or disk.file(sealed).read_bytes() != before

    with pytest.raises(SealedCacheDamaged):
        disk.restore(sealed)


def test_every_single_byte_counts(disk: Disk) -> None:
    sealed = disk.offload(owner(), PARTS[:1])
    file = disk.file(sealed)
    content = file.read_bytes()
    for at in range(0, len(content), 7):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
        with pytest.raises(SealedCacheDamaged):
            disk.restore(sealed)
    file.write_bytes(content)
    assert disk.restore(sealed).header.groups == PARTS[0].header.groups


def swapped(one: Path, two: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def test_files_of_two_tenants_contexts_or_parts_that_change_places_are_refused(
    disk: Disk,
) -> None:
    spills = [
        disk.offload(owner()),
        disk.offload(owner("blue", "c1", "u2")),
        disk.offload(owner(context="c2")),
    ]
    pairs = [
        (disk.file(spills[0]), disk.file(spills[1])),
        (disk.file(spills[0]), disk.file(spills[2])),
        (disk.file(spills[0]), disk.file(spills[0], 1)),
    ]
    for one, two in pairs:
        swapped(one, two)
        with pytest.raises(SealedCacheDamaged):
            disk.restore(spills[0])
        swapped(one, two)
    for sealed in spills:
        assert_whole(disk.restore(sealed))


def test_an_older_offload_of_the_same_context_is_refused_in_the_place_of_the_newer(
    disk: Disk, tmp_path: Path
) -> None:
    older = disk.offload(owner())
    shutil.copytree(disk.folder / older.spill, tmp_path / "copy")
    newer = disk.offload(owner())

    shutil.rmtree(disk.folder / newer.spill)
    shutil.copytree(tmp_path / "copy", disk.folder / newer.spill)
    with pytest.raises(SealedCacheDamaged):
        disk.restore(newer)
    shutil.copytree(tmp_path / "copy", disk.folder / older.spill)
    with pytest.raises(SealedCacheUnknown):
        disk.restore(older)


def test_another_attempt_at_a_part_is_not_taken_for_the_committed_one(disk: Disk) -> None:
    """Under one ticket and with right seals: a rank that was thought dead, or a replay."""
    ticket = disk.tier.begin(owner(), KEYS, num_parts=1)
    write_part(ticket, 0, part((0,), (1, 3), seed=9))
    late = part_file(ticket, 0).read_bytes()
    receipt = write_part(ticket, 0, PARTS[0])
    sealed = disk.tier.commit(ticket, [receipt], KEYS)
    assert disk.restore(sealed).tensors.keys() == PARTS[0].tensors.keys()

    disk.file(sealed).write_bytes(late)

    with pytest.raises(SealedCacheDamaged):
        disk.restore(sealed)


@pytest.mark.parametrize("column", ["record", "receipts", "wrapped_key"])
def test_a_changed_row_of_the_index_is_refused(column: str, disk: Disk) -> None:
    one, two = disk.offload(owner()), disk.offload(owner(context="c2"))
    intruder = sqlite3.connect(disk.index)
    with intruder:
        intruder.execute(
            f"UPDATE spills SET {column} = (SELECT {column} FROM spills WHERE spill = ?) "
            "WHERE spill = ?",
            (two.spill, one.spill),
        )
    intruder.close()

    with pytest.raises((SealedCacheDamaged, SealedCacheUnknown)):
        disk.restore(one)


def test_not_yours_and_not_there_get_one_answer(disk: Disk) -> None:
    sealed = disk.offload(owner())
    texts = set()
    for of, spill in (
        (owner("blue", uid="u2"), sealed.spill),
        (owner(context="c2"), sealed.spill),
        (owner(uid="later tenant of the same id"), sealed.spill),
        (owner(), "0" * 32),
        (owner(), "../../etc"),
    ):
        with pytest.raises(SealedCacheUnknown) as unknown:
            disk.tier.open(of, spill, KEYS)
        texts.add(unknown.value.message.replace(spill, "SPILL"))
        with pytest.raises(SealedCacheUnknown):
            disk.tier.delete(of, spill)
    assert len(texts) == 1
    assert_whole(disk.restore(sealed))


def test_without_its_data_key_a_spill_cannot_be_read_nor_with_another_tenants(
    disk: Disk,
) -> None:
    sealed = disk.offload(owner())

    with pytest.raises(SealedCacheErased):
        disk.restore(sealed, {3: secrets.token_bytes(32)})
    with pytest.raises(SealedCacheErased):
        disk.restore(sealed, {})
    with pytest.raises(SealedCacheErased):
        disk.offload(owner(), keys={})
    with pytest.raises(SealedCacheDamaged):
        disk.restore(sealed, OTHER_KEYS)
    assert_whole(disk.restore(sealed, KEYS | {3: secrets.token_bytes(32)}))


def test_a_deleted_spill_cannot_be_read_by_whoever_kept_its_files_and_the_data_key(
    disk: Disk, tmp_path: Path
) -> None:
    """Its own key was in the index alone, and is nowhere in that file any more."""
    sealed = disk.offload(owner())
    ticket = disk.tier.open(owner(), sealed.spill, KEYS)
    wrapped = disk.tier._index.find(sealed.spill)
    assert wrapped is not None
    shutil.copytree(disk.folder / sealed.spill, tmp_path / "copy")
    index_files = [disk.index, Path(f"{disk.index}-wal")]
    assert any(wrapped.wrapped_key in file.read_bytes() for file in index_files)

    disk.tier.delete(owner(), sealed.spill)

    for file in index_files:
        assert wrapped.wrapped_key not in file.read_bytes()
        assert ticket.key not in file.read_bytes()
    assert not disk.folder.joinpath(sealed.spill).exists()
    with pytest.raises(SealedCacheUnknown):
        disk.restore(sealed)


def test_a_newer_offload_replaces_the_older_and_what_is_not_committed_is_not_there(
    disk: Disk,
) -> None:
    older = disk.offload(owner(), PARTS[:1])
    ticket = disk.tier.begin(owner(), KEYS, num_parts=2)
    write_part(ticket, 0, PARTS[0])
    assert disk.tier.listed() == [older]
    disk.tier.abandon(ticket)
    assert not Path(ticket.folder).exists()
    newer = disk.offload(owner())

    assert disk.tier.listed() == [newer]
    assert disk.bytes_there() == newer.num_bytes
    assert_whole(disk.restore(newer))


def test_parts_that_are_missing_doubled_or_of_another_size_are_not_committed(
    disk: Disk,
) -> None:
    ticket = disk.tier.begin(owner(), KEYS, num_parts=2)
    receipts = [write_part(ticket, rank, saved) for rank, saved in enumerate(PARTS)]
    larger = msgspec.structs.replace(receipts[1], num_bytes=receipts[1].num_bytes + 1)
    wrong: tuple[list[PartReceipt], ...] = (
        receipts[:1],
        [receipts[0], receipts[0]],
        [receipts[0], larger],
        [],
    )
    for given in wrong:
        with pytest.raises(SealedCacheDamaged):
            disk.tier.commit(ticket, given, KEYS)
    assert disk.tier.listed() == []
    assert_whole(disk.restore(disk.tier.commit(ticket, receipts[::-1], KEYS)))
    with pytest.raises(SealedCacheDamaged, match="not being written"):
        disk.tier.commit(ticket, receipts, KEYS)


def test_what_a_crash_left_is_swept_and_other_peoples_files_are_not(disk: Disk) -> None:
    kept = disk.offload(owner())
    ticket = disk.tier.begin(owner(context="c2"), KEYS, num_parts=1)
    write_part(ticket, 0, PARTS[0])
    (disk.folder / "lost+found").mkdir()

    again = reopened(disk)

    names = {entry.name for entry in disk.folder.iterdir()}
    assert names == {kept.spill, "lost+found"}
    with pytest.raises(SealedCacheDamaged):
        again.tier.commit(ticket, [], KEYS)
    again.tier.close()


@contextmanager
def no_file_over(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 600])
def test_on_a_full_disk_nothing_new_is_kept_and_nothing_old_is_lost(room: int, disk: Disk) -> None:
    kept = disk.offload(owner())
    ticket = disk.tier.begin(owner(), KEYS, num_parts=1)
    assert part_bytes(PARTS[0]) > room

    with no_file_over(room), pytest.raises(SpillDiskFull):
        write_part(ticket, 0, PARTS[0])

    assert list(Path(ticket.folder).iterdir()) == []
    disk.tier.abandon(ticket)
    assert disk.tier.listed() == [kept]
    assert_whole(disk.restore(kept))


def test_an_index_that_is_full_keeps_the_older_spill(disk: Disk) -> None:
    kept = disk.offload(owner())
    ticket = disk.tier.begin(owner(), KEYS, num_parts=1)
    receipt = write_part(ticket, 0, PARTS[0])

    # SQLite takes a limit of the process for a fault of the disk.
    with no_file_over(4096), pytest.raises((SpillDiskFull, SpillUnavailable)):
        disk.tier.commit(ticket, [receipt], KEYS)

    assert disk.tier.listed() == [kept]
    assert_whole(disk.restore(kept))
    assert disk.tier.commit(ticket, [receipt], KEYS).spill == ticket.spill


def test_a_note_comes_back_after_a_restart_sealed_like_the_rest(disk: Disk) -> None:
    note = b"tokens of the context " * 1000
    ticket = disk.tier.begin(owner(), KEYS, num_parts=1)
    receipt = write_part(ticket, 0, PARTS[0])
    sealed = disk.tier.commit(ticket, [receipt], KEYS, note=note)
    again = reopened(disk)

    assert again.tier.read_note(owner(), sealed.spill, KEYS) == note
    assert sealed.num_bytes == part_bytes(PARTS[0]) + note_bytes(len(note)) == disk.bytes_there()
    file = disk.file(sealed, 1)
    assert b"tokens" not in file.read_bytes()
    with pytest.raises(SealedCacheUnknown):
        again.tier.read_note(owner("blue"), sealed.spill, KEYS)
    with pytest.raises(SealedCacheErased):
        again.tier.read_note(owner(), sealed.spill, {})
    flip(-20)(file)
    with pytest.raises(SealedCacheDamaged):
        again.tier.read_note(owner(), sealed.spill, KEYS)
    again.tier.close()


def test_a_ticket_does_not_show_its_key(disk: Disk) -> None:
    ticket = disk.tier.begin(owner(), KEYS, num_parts=1)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(ticket), type=SpillTicket)

    assert back == ticket
    assert "key" not in repr(ticket)
    assert ticket.key.hex() not in repr(ticket)


def test_an_index_of_another_program_is_a_wrong_setting(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "index.sqlite")
    other.execute("CREATE TABLE mine (a)")
    other.close()

    with pytest.raises(ConfigError, match=r"spill\.index"):
        SpillDisk(tmp_path / "spill", tmp_path / "index.sqlite")


def test_the_engines_side_needs_no_torch() -> None:
    code = "import sys, kvcluster.cache.spill_disk; print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "False"
