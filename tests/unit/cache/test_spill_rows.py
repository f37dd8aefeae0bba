"""A row of the index that cannot be read is one damaged context: the others stay what they are."""

import sqlite3
from pathlib import Path

import msgspec
import pytest

from kvcluster.cache.spill import SealedContext
from kvcluster.errors import SealedCacheDamaged
from kvcluster.types import TenantId
from tests.unit.cache.test_spill import KEYS, Disk, assert_whole, disk, owner, reopened

__all__ = ["disk"]

SPOILT = {
    "no record": "record = x''",
    "no msgpack": "record = x'c1c1c1'",
    "text that is none": "record = x'81a9ffffffffffffffffffc0'",
    "a record cut short": "record = substr(record, 1, length(record) - 3)",
    "another's record": "record = (SELECT record FROM spills WHERE context = 'c2')",
    "no receipts": "receipts = x'c0'",
    "receipts cut short": "receipts = substr(receipts, 1, 20)",
    "another context": "context = 'c9'",
    "another tenant": "tenant = 'blue'",
}


def spoil(index: Path, change: str) -> None:
    with sqlite3.connect(index) as intruder:
        intruder.execute(f"UPDATE spills SET {change} WHERE context = 'c1'")
    intruder.close()


def damaged_of(disk: Disk) -> tuple[SealedContext, SealedContext]:
    """The damaged one and the other."""
    one, two = sorted(disk.tier.listed(), key=lambda sealed: not sealed.is_damaged)
    assert (one.is_damaged, two.is_damaged) == (True, False)
    return one, two


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("change", SPOILT.values(), ids=SPOILT.keys())
def test_a_row_that_cannot_be_read_is_damaged_alone_and_counted_as_it_lies_there(
    change: str, is_restarted: bool, disk: Disk
) -> None:
    first, second = disk.offload(owner()), disk.offload(owner(context="c2"))
    if is_restarted:
        disk.tier.close()
        spoil(disk.index, change)
        disk = reopened(disk)
    else:
        spoil(disk.index, change)
    damaged, other = damaged_of(disk)

    assert (damaged.spill, damaged.num_bytes) == (first.spill, first.num_bytes)
    assert other == second
    used = sum(map(disk.tier.used_bytes, map(TenantId, ("red", "blue"))))
    assert used == disk.bytes_there()
    assert_whole(disk.restore(other))
    for read in (disk.tier.open, disk.tier.read_note):
        with pytest.raises(SealedCacheDamaged, match="in the index was changed"):
            read(damaged.owner, damaged.spill, KEYS)
    with pytest.raises(SealedCacheDamaged, match="in the index was changed"):
        disk.tier.replace_note(damaged.owner, damaged.spill, KEYS, b"note")
    disk.tier.delete(damaged.owner, damaged.spill)
    assert disk.tier.listed() == [second]
    assert disk.bytes_there() == second.num_bytes
    if is_restarted:
        disk.tier.close()


def test_an_offload_takes_the_place_of_a_damaged_one(disk: Disk) -> None:
    disk.offload(owner())
    spoil(disk.index, SPOILT["no record"])

    newer = disk.offload(owner())

    assert disk.tier.listed() == [newer]
    assert disk.bytes_there() == newer.num_bytes


def test_what_was_indexed_before_rows_could_be_damaged_is_read(disk: Disk) -> None:
    """The seal around a spill's key is over the record, so it has to be encoded as it was."""
    sealed = disk.offload(owner())
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(sealed))

    assert set(fields) == {
        *("spill", "owner", "num_parts", "num_bytes", "key_version", "create_time_s")
    }
