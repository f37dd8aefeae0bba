"""The cache of one sequence outside its ranks: read from stores, kept in one file, written back.

Nothing is decoded or encoded on the way, so attention reads the same bytes after a load as before
the save, on any number of ranks: how blocks are spread over ranks, and where they lie in a store,
is no part of what is saved. Each rank reads and writes the blocks that are its own.

File: safetensors with a sealed record (`codec/sealed_file.py`). For layer i of KV group g the
tensors `g.i.exact.keys` and, unless values are part of keys, `g.i.exact.values` [T, K, D] hold its
exact tokens, and `g.i.encoded.N` [B, ...] plane N of the encoded blocks that it stores itself
(those of the keys first); entries ascend, and the record lists them. Entry e covers positions
[e * block_size, (e + 1) * block_size). Entries that the sequence has released are in neither list.

Shape letters: T tokens, B blocks, K KV heads, D head dimension.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor

from kvcluster.cache.encoded_pages import layers_of
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.shard import SequenceMap
from kvcluster.cache.store import KVStore, keys_and_values
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.codec.sealed_file import FileKind
from kvcluster.errors import SavedCacheMismatch
from kvcluster.types import EXACT, ModelSpec

_EXACT: Final = "exact"
_ENCODED: Final = "encoded"


class StoredForm(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What gives stored bytes their meaning: equal where they are saved and where they are read."""

    weights_digest: str
    dtype: str
    """Of exact tokens."""
    windows: tuple[int | None, ...]
    """One KV group each."""
    block_size: int
    codec: str
    calibration_digest: str
    """Empty for a codec that was not fitted."""
    exact_blocks: int
    """Blocks before the open one that are read exact."""
    encoded_step: int | None = None
    """See `ExactRegion.step_blocks`."""


class HeldEntries(msgspec.Struct, frozen=True):
    """The entries of one KV group that are in a saved cache, ascending."""

    exact: tuple[int, ...]
    encoded: tuple[int, ...]


class SavedHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a file."""

    format_version: int
    form: StoredForm
    num_tokens: int
    """Of the sequence; the last entry may hold fewer than a block."""
    groups: tuple[HeldEntries, ...]
    digest: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SavedCache:
    """A sequence's cache, or the part of it that one rank holds."""

    header: SavedHeader
    tensors: Mapping[str, Tensor]


_FILE: Final = FileKind(
    name="saved cache",
    metadata_key="kvcluster.saved_cache",
    format_version=1,
    header=SavedHeader,
    error=SavedCacheMismatch,
)


def stored_form(
    spec: ModelSpec, codecs: ModelCodecs, codec: str, *, block_size: int, exact_blocks: int
) -> StoredForm:
    """The form of a sequence's blocks. `exact_blocks` as in `CacheRules`."""
    return StoredForm(
        weights_digest=spec.weights_digest,
        dtype=spec.dtype,
        windows=spec.windows,
        block_size=block_size,
        codec=codec,
        calibration_digest="" if codec == EXACT else codecs.calibration_digest(codec),
        exact_blocks=0 if codec == EXACT else exact_blocks,
        encoded_step=codecs.encoded_step(codec, exact_blocks),
    )


def read_held(
    store: KVStore,
    table: SequenceMap,
    *,
    rank: int,
    form: StoredForm,
    num_tokens: int,
    only: Collection[int] | None = None,
) -> SavedCache:
    """Copies of what `rank` holds of a sequence whose first `num_tokens` are computed, between two
    steps. `store` is that rank's. `only`: of these entries; None: of all."""
    held = [
        owned_entries(table, rank, _held(table, group, form, num_tokens))
        for group in range(len(form.windows))
    ]
    if only is not None:
        held = [entries_among(entries, only) for entries in held]
    header = SavedHeader(
        format_version=_FILE.format_version, form=form, num_tokens=num_tokens, groups=tuple(held)
    )
    tensors: dict[str, Tensor] = {}
    for group, entries in enumerate(held):
        places = _Places(table, rank, group, header)
        runs, ids_B = places.runs(entries.exact), places.encoded_ids(entries.encoded)
        for layer, _ in layers_of(store.spec, group):
            exact = [plane.transpose(0, 1) for plane in store.gather(layer, runs).planes]
            encoded = []
            if form.codec != EXACT:
                encoded = store.read_held(layer, form.codec, ids_B)
            tensors |= _named(group, layer, exact, encoded)
    return SavedCache(
        header,
        {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()},
    )


def join(parts: Sequence[SavedCache]) -> SavedCache:
    """The parts of all ranks as one. They must be of one sequence, and no two share an entry."""
    first = parts[0].header
    groups = tuple(
        HeldEntries(
            tuple(sorted(entry for held in of_ranks for entry in held.exact)),
            tuple(sorted(entry for held in of_ranks for entry in held.encoded)),
        )
        for of_ranks in zip(*(part.header.groups for part in parts), strict=True)
    )
    rows = [rows_by_entry(part) for part in parts]

    def joined(name: str) -> Tensor:
        by_entry = {entry: x for part in rows for entry, x in part[name].items()}
        if not by_entry:
            return parts[0].tensors[name]
        return torch.cat([by_entry[entry] for entry in sorted(by_entry)])

    return SavedCache(
        msgspec.structs.replace(first, groups=groups),
        {name: joined(name) for name in parts[0].tensors},
    )


def write_held(store: KVStore, table: SequenceMap, *, rank: int, saved: SavedCache) -> None:
    """Write the entries that `rank` owns in `table` into its store, to the blocks that the table
    has for them. `saved` is whole, or has at least those entries.

    Raises: SavedCacheMismatch when its arrays are not those of this store.
    """
    rows, codec = rows_by_entry(saved), saved.header.form.codec
    for group, entries in enumerate(saved.header.groups):
        own = owned_entries(table, rank, entries)
        places = _Places(table, rank, group, saved.header)
        slots_T, ids_B = places.slots(own.exact), places.encoded_ids(own.encoded)
        for layer, geometry in layers_of(store.spec, group):
            exact = [plane.transpose(0, 1) for plane in store.empty(layer, 0).planes]
            encoded = [] if codec == EXACT else store.read_held(layer, codec, ids_B[:0])
            stored = [
                _joined(rows, name, like, own)
                for name, like in _named(group, layer, exact, encoded).items()
            ]
            kv_TKD = keys_and_values(stored[: len(exact)], geometry)
            store.write(layer, store.places(slots_T), *kv_TKD)
            if codec != EXACT:
                store.write_held(layer, codec, ids_B, stored[len(exact) :])


def write_file(path: Path, saved: SavedCache) -> None:
    """Write a whole cache, replacing an older file only once it is complete. Raises: OSError."""
    _FILE.write(path, saved.header, saved.tensors)


def read_file(path: Path, form: StoredForm) -> SavedCache:
    """Read a cache that is to be used in this form, every byte checked.

    Raises: SavedCacheMismatch when it is missing, truncated, edited, of an unknown version, or was
    saved in another form, which it names.
    """
    header, tensors = _FILE.read(path)
    check_form(header.form, form, f"saved cache {path}")
    return SavedCache(header, tensors)


def check_form(saved: StoredForm, form: StoredForm, what: str) -> None:
    """Whether bytes of one form can be used in the other. Raises: SavedCacheMismatch, naming
    `what` and the first difference."""
    for field, meaning in _MEANINGS.items():
        theirs, ours = getattr(saved, field), getattr(form, field)
        if theirs != ours:
            raise SavedCacheMismatch(
                f"{what} was saved with another {meaning}: {theirs}, here {ours}"
            )


_MEANINGS: Final = {
    "weights_digest": "model (digest of its weights)",
    "dtype": "dtype",
    "windows": "set of attention windows",
    "block_size": "block size",
    "codec": "codec",
    "calibration_digest": "calibration",
    "exact_blocks": "number of blocks that are read exact",
    "encoded_step": "number of blocks that are encoded at a time",
}


def _held(table: SequenceMap, group: int, form: StoredForm, num_tokens: int) -> HeldEntries:
    """What all ranks together hold of a group, as attention finds it."""
    num_entries = -(-num_tokens // form.block_size)
    num_encoded = 1
    if form.codec != EXACT:
        region = ExactRegion(form.exact_blocks, form.encoded_step)
        num_encoded = max(1, region.first_block(num_tokens // form.block_size))
    released = table.released(group)
    kept = [entry for entry in range(num_entries) if entry not in released]
    encoded = tuple(entry for entry in kept if 1 <= entry < num_encoded)
    return HeldEntries(
        tuple(entry for entry in kept if entry not in range(1, num_encoded)), encoded
    )


def owned_entries(table: SequenceMap, rank: int, entries: HeldEntries) -> HeldEntries:
    """Those that lie on the rank."""

    def own(all_entries: Iterable[int]) -> tuple[int, ...]:
        return tuple(e for e in all_entries if table.owner(e * table.block_size) == rank)

    return HeldEntries(own(entries.exact), own(entries.encoded))


def entries_among(entries: HeldEntries, wanted: Collection[int]) -> HeldEntries:
    """Those that are wanted."""
    return HeldEntries(
        tuple(entry for entry in entries.exact if entry in wanted),
        tuple(entry for entry in entries.encoded if entry in wanted),
    )


class _Places:
    """Where one rank's entries of one group lie in its store."""

    def __init__(self, table: SequenceMap, rank: int, group: int, header: SavedHeader) -> None:
        self._table = table
        self._rank = rank
        self._group = group
        self._num_tokens = header.num_tokens

    def runs(self, entries: Iterable[int]) -> list[slice]:
        """Slots of the exact tokens, entry by entry."""
        size = self._table.block_size
        return [
            run
            for entry in entries
            for run in self._table.runs(
                self._rank, self._group, entry * size, min((entry + 1) * size, self._num_tokens)
            )
        ]

    def slots(self, entries: Iterable[int]) -> Tensor:
        """The same, one by one, int64."""
        slots = [torch.arange(run.start, run.stop) for run in self.runs(entries)]
        return torch.cat(slots) if slots else torch.empty(0, dtype=torch.long)

    def encoded_ids(self, entries: Iterable[int]) -> Tensor:
        """Encoded blocks, int64."""
        size = self._table.block_size
        ids = [
            int(block_id)
            for entry in entries
            for block_id in self._table.encoded_ids(
                self._rank, self._group, entry * size, (entry + 1) * size
            )
        ]
        return torch.tensor(ids, dtype=torch.long)


def _named(
    group: int, layer: int, exact: Sequence[Tensor], encoded: Sequence[Tensor]
) -> dict[str, Tensor]:
    # Values that are part of the keys are not stored.
    arrays = zip(("keys", "values"), exact, strict=False)
    planes = enumerate(encoded)
    return {f"{group}.{layer}.{_EXACT}.{array}": x_TKD for array, x_TKD in arrays} | {
        f"{group}.{layer}.{_ENCODED}.{index}": plane for index, plane in planes
    }


def entries_of(name: str, header: SavedHeader) -> tuple[tuple[int, ...], list[int]]:
    """The entries of a tensor, and how long each is."""
    group, _, kind, _ = name.split(".")
    entries = header.groups[int(group)]
    if kind == _ENCODED:
        return entries.encoded, [1] * len(entries.encoded)
    size = header.form.block_size
    return entries.exact, [min(size, header.num_tokens - e * size) for e in entries.exact]


def rows_by_entry(saved: SavedCache) -> dict[str, dict[int, Tensor]]:
    """Views of each tensor's entries. Raises: SavedCacheMismatch when it has other entries than
    the record says."""
    views = {}
    for name, tensor in saved.tensors.items():
        entries, lengths = entries_of(name, saved.header)
        if sum(lengths) != len(tensor):
            raise SavedCacheMismatch(
                f"tensor {name} of the saved cache has {len(tensor)} rows, not {sum(lengths)}"
            )
        views[name] = dict(zip(entries, torch.split(tensor, lengths), strict=True))
    return views


def _joined(
    rows: Mapping[str, Mapping[int, Tensor]], name: str, like: Tensor, own: HeldEntries
) -> Tensor:
    """The rows of this rank's entries. `like` is such a tensor without rows."""
    entries = own.encoded if f".{_ENCODED}." in name else own.exact
    found = rows.get(name, {})
    if not entries:
        return like
    missing = [entry for entry in entries if entry not in found]
    if missing:
        raise SavedCacheMismatch(f"tensor {name} of the saved cache lacks entry {missing[0]}")
    joined = torch.cat([found[entry] for entry in entries])
    if (joined.shape[1:], joined.dtype) != (like.shape[1:], like.dtype):
        raise SavedCacheMismatch(
            f"tensor {name} of the saved cache has rows {tuple(joined.shape[1:])} of "
            f"{joined.dtype}, not {tuple(like.shape[1:])} of {like.dtype}"
        )
    return joined.to(like.device)
