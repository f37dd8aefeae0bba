"""A rank's part of a saved cache, sealed into a file, and entries of any parts read back.

One record holds one entry of one KV group in one form: the rows of all its layers' arrays, in the
order of the arrays' names. So whoever restores reads the entries that are its own and no others,
on any number of ranks, and no file is ever in memory as a whole.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import msgspec
import numpy as np
import torch
from torch import Tensor

from kvcluster.cache.saved import (
    HeldEntries,
    SavedCache,
    SavedHeader,
    StoredForm,
    check_form,
    entries_among,
    entries_of,
    owned_entries,
    rows_by_entry,
    write_held,
)
from kvcluster.cache.sealed_files import disk_errors, open_sealed, write_sealed
from kvcluster.cache.sealed_records import PartHeader, PartReader, RecordPlace, sealed_bytes
from kvcluster.cache.shard import SequenceMap
from kvcluster.cache.spill import PartReceipt, SpillTicket
from kvcluster.cache.store import KVStore
from kvcluster.errors import SealedCacheDamaged

BlockKeys = Mapping[int, bytes]
"""By entry: the keyed hash of its tokens and all before them."""

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}


class _ArrayForm(msgspec.Struct, frozen=True, array_like=True):
    """Of one array: all but its number of rows."""

    name: str
    dtype: str
    row_shape: tuple[int, ...]


class _Content(msgspec.Struct, frozen=True):
    """What the header of a file holds."""

    saved: SavedHeader
    arrays: tuple[_ArrayForm, ...]


def part_bytes(saved: SavedCache, block_keys: BlockKeys | None = None) -> int:
    """Bytes of the file that `write_part` would write, exactly."""
    return sealed_bytes(_header(saved, rows_by_entry(saved), block_keys or {}))


def write_part(
    ticket: SpillTicket, part: int, saved: SavedCache, block_keys: BlockKeys | None = None
) -> PartReceipt:
    """Write what one rank holds of a context, sealed; on return it is on the disk. `part`: from 0,
    below the ticket's number.

    Raises: SpillDiskFull, SpillUnavailable; no file is left then.
    """
    rows = rows_by_entry(saved)
    header = _header(saved, rows, block_keys or {})
    contents = (_content_of(rows, place) for place in header.places)
    return write_sealed(ticket, part, header, contents)


def restore(
    store: KVStore, table: SequenceMap, *, rank: int, form: StoredForm, ticket: SpillTicket
) -> None:
    """Read the entries that `rank` owns in `table`, and write them into its store, to the blocks
    that the table has for them.

    Raises: SavedCacheMismatch for a cache that was written in another form, SealedCacheDamaged,
    SpillUnavailable.
    """
    with _opened(ticket) as (readers, content):
        check_form(content.saved.form, form, f"sealed cache {ticket.spill}")
        own = tuple(owned_entries(table, rank, held) for held in content.saved.groups)
        saved = _read(readers, content, own)
    write_held(store, table, rank=rank, saved=saved)


@contextmanager
def opened_form(
    ticket: SpillTicket, form: StoredForm, num_tokens: int, block_keys: Sequence[bytes]
) -> Iterator[Callable[[Collection[int]], SavedCache]]:
    """Gives what reads entries of a spill, from whichever parts have them, as `read_parts` does.
    `block_keys`: of all its entries, as they were written.

    Raises: SavedCacheMismatch for a cache that was written in another form, SealedCacheDamaged when
    it is not of these blocks or this length, SpillUnavailable.
    """
    with _opened(ticket) as (readers, content):
        check_form(content.saved.form, form, f"sealed cache {ticket.spill}")
        places = [place for reader in readers for place in reader.header.places]
        if content.saved.num_tokens != num_tokens or any(
            place.entry >= len(block_keys) or place.block_key != block_keys[place.entry]
            for place in places
        ):
            raise SealedCacheDamaged(
                f"sealed cache {ticket.spill} is of other tokens: compute the context again"
            )

        def read(entries: Collection[int]) -> SavedCache:
            wanted = tuple(entries_among(held, entries) for held in content.saved.groups)
            return _read(readers, content, wanted)

        yield read


def read_parts(ticket: SpillTicket, wanted: Sequence[HeldEntries] | None = None) -> SavedCache:
    """The entries of each KV group that are `wanted`, from whichever parts have them; None: all.
    The tensors are on the CPU.

    Raises: SealedCacheDamaged for a file that is missing or not what was written, or when no part
    has an entry; SpillUnavailable.
    """
    with _opened(ticket) as (readers, content):
        return _read(readers, content, content.saved.groups if wanted is None else tuple(wanted))


@contextmanager
def _opened(ticket: SpillTicket) -> Iterator[tuple[list[PartReader], _Content]]:
    """All parts, and what they hold together."""
    with ExitStack() as stack:
        readers = []
        for receipt in ticket.receipts:
            reader = open_sealed(ticket, receipt)
            stack.callback(reader.close)
            readers.append(reader)
        contents = [msgspec.msgpack.decode(r.header.content, type=_Content) for r in readers]
        groups = _all_entries([content.saved for content in contents])
        saved = msgspec.structs.replace(contents[0].saved, groups=groups)
        yield readers, _Content(saved, contents[0].arrays)


def _read(
    readers: Sequence[PartReader], content: _Content, groups: tuple[HeldEntries, ...]
) -> SavedCache:
    header = msgspec.structs.replace(content.saved, groups=groups)
    found = {
        (place.kind, place.group, place.entry): (reader, index)
        for reader in readers
        for index, place in enumerate(reader.header.places)
    }
    tensors: dict[str, Tensor] = {}
    for group in range(len(groups)):
        for kind in ("exact", "encoded"):
            arrays = [array for array in content.arrays if _is_of(array.name, group, kind)]
            if not arrays:
                continue
            entries, lengths = entries_of(arrays[0].name, header)
            missing = [entry for entry in entries if (kind, group, entry) not in found]
            if missing:
                raise SealedCacheDamaged(f"no part of the spill has entry {missing[0]}")
            filled = [_empty(array, sum(lengths)) for array in arrays]
            start = 0
            for entry, length in zip(entries, lengths, strict=True):
                reader, index = found[kind, group, entry]
                with disk_errors("read"):
                    record = reader.read(index)
                _fill([x[start : start + length] for x in filled], record)
                start += length
            tensors |= {array.name: x for array, x in zip(arrays, filled, strict=True)}
    return SavedCache(header, tensors)


def _fill(rows: Sequence[Tensor], record: bytes) -> None:
    """Write the record's rows, array by array, into those of the tensors."""
    if sum(x.nbytes for x in rows) != len(record):
        raise SealedCacheDamaged("a record of the spill has another length than its arrays")
    at = 0
    for x in rows:
        if x.nbytes:
            # Into numpy's view of the tensor, because torch reads no buffer that it may not write.
            flat = x.view(-1).view(torch.uint8).numpy()
            flat[:] = np.frombuffer(record, np.uint8, x.nbytes, at)
            at += x.nbytes


def _empty(array: _ArrayForm, num_rows: int) -> Tensor:
    return torch.empty(num_rows, *array.row_shape, dtype=_DTYPES[array.dtype])


def _header(
    saved: SavedCache, rows: Mapping[str, Mapping[int, Tensor]], block_keys: BlockKeys
) -> PartHeader:
    arrays = tuple(
        _ArrayForm(name, str(x.dtype), tuple(x.shape[1:]))
        for name, x in sorted(saved.tensors.items())
    )
    places = []
    for group, held in enumerate(saved.header.groups):
        for kind, entries in (("exact", held.exact), ("encoded", held.encoded)):
            for entry in entries:
                size = sum(x.nbytes for x in _arrays_of(rows, group, kind, entry))
                key = block_keys.get(entry, b"")
                places.append(RecordPlace(kind, group, entry, size, key))
    content = msgspec.msgpack.encode(_Content(saved.header, arrays))
    return PartHeader(content=content, places=tuple(places))


def _content_of(rows: Mapping[str, Mapping[int, Tensor]], place: RecordPlace) -> bytes:
    arrays = _arrays_of(rows, place.group, place.kind, place.entry)
    return b"".join(
        # numpy has no bfloat16 and no 8-bit floats.
        x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for x in arrays
    )


def _arrays_of(
    rows: Mapping[str, Mapping[int, Tensor]], group: int, kind: str, entry: int
) -> Iterator[Tensor]:
    for name, by_entry in sorted(rows.items()):
        if _is_of(name, group, kind):
            yield by_entry[entry]


def _is_of(name: str, group: int, kind: str) -> bool:
    of_group, _, of_kind, _ = name.split(".")
    return (of_group, of_kind) == (str(group), kind)


def _all_entries(headers: Sequence[SavedHeader]) -> tuple[HeldEntries, ...]:
    return tuple(
        HeldEntries(
            tuple(sorted(entry for held in of_parts for entry in held.exact)),
            tuple(sorted(entry for held in of_parts for entry in held.encoded)),
        )
        for of_parts in zip(*(header.groups for header in headers), strict=True)
    )
