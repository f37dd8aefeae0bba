"""Contexts that leave the GPUs, sealed: the records that travel, and what a tier off them does.

Two sides. The engine's process decides: `SpillTier` begins, commits, lists and deletes. The ranks
carry bytes: each writes its part of a context (`spill_parts.write_part`) with the ticket that the
engine sends it, and any number of ranks read what they need of all parts (`restore`).

    engine            ticket = tier.begin(owner, keys, num_parts=3)
    ranks 0, 1, 2     receipt = write_part(ticket, rank, saved)
    engine            sealed = tier.commit(ticket, receipts, keys)
    ...
    engine            ticket = tier.open(owner, sealed.spill, keys)
    ranks 0, 1        restore(store, table, rank, form, ticket): what each owns in the new table

Whoever keeps a limit of the tier asks the ranks for `spill_parts.part_bytes` first, which is exact,
and takes their sum and `spill_folder.note_bytes` from the tenant's share before `begin`;
`used_bytes` is the same sum afterwards.

What is sealed: AES-256-GCM under a key of its own for every spill, wrapped by the tenant's data
key. So destroying a tenant's data keys makes all its spills unreadable, and deleting one spill
destroys its own key: ciphertext that the disk may keep (no overwriting reaches what an SSD, a
snapshot or a copy has kept, so none is attempted) opens with nothing. Not sealed: sizes, times and
numbers of files, and the ids of tenants and contexts in the index.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from kvcluster.types import TenantId

DataKeys = Mapping[int, bytes]
"""A tenant's data keys by version, as `TenantStore.data_keys` gives them."""


class SpillOwner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose context it is. All three are bound into every record of it."""

    tenant: TenantId
    tenant_uid: str
    """So that a later tenant of the same id is another owner."""
    context: str


class PartReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank tells of the part that it has written and synced."""

    part: int
    num_bytes: int
    """Of the file."""
    salt: bytes
    """The file's own: one that was written by another attempt is not taken for it."""


class SpillTicket(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank needs to write or read its share of one spill. Holds the spill's key: it goes
    from the engine to ranks of the same cluster, and nowhere else."""

    spill: str
    owner: SpillOwner
    folder: str
    """Of this spill; every rank's machine sees it at this path."""
    key: bytes
    num_parts: int
    receipts: tuple[PartReceipt, ...] = ()
    """Of the parts, where the ticket is for reading."""

    def __repr__(self) -> str:
        return f"SpillTicket(spill={self.spill!r}, num_parts={self.num_parts})"


class SealedContext(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One context off the GPUs, complete."""

    spill: str
    """Its id: of this offload of the context, and no other."""
    owner: SpillOwner
    num_parts: int
    num_bytes: int
    """Of its files, exactly; that of the note included."""
    key_version: int
    """Of the data key that it needs."""
    create_time_s: float
    is_damaged: bool = False
    """What the index says of it cannot be read: nothing can be done with it but to delete it, and
    `num_bytes` are those of the files that are there. Of its owner, the uid is not known."""


class SpillTier(Protocol):
    """The host's memory or a disk, as contexts use it. Methods block on the files; they may be
    called from any thread. All raise SpillUnavailable when files cannot be read or written."""

    def begin(self, owner: SpillOwner, keys: DataKeys, *, num_parts: int) -> SpillTicket:
        """Make room for a spill, invisible until it is committed. Raises: SealedCacheErased for a
        tenant without data key, SpillDiskFull."""
        ...

    def commit(
        self,
        ticket: SpillTicket,
        receipts: Sequence[PartReceipt],
        keys: DataKeys,
        *,
        note: bytes = b"",
    ) -> SealedContext:
        """Make the spill the context's own, from one moment to the next and for good; an earlier
        one of the context is deleted. `note`: what the engine has to know of the context after a
        restart, such as its tokens; sealed like the rest.

        Raises: SealedCacheDamaged when a part is missing, or was begun before the last start,
        SpillDiskFull; the spill may be committed again, or abandoned.
        """
        ...

    def read_note(self, owner: SpillOwner, spill: str, keys: DataKeys) -> bytes:
        """What `commit` was given. Raises: as `open`."""
        ...

    def replace_note(
        self, owner: SpillOwner, spill: str, keys: DataKeys, note: bytes
    ) -> SealedContext:
        """Give a spill another note, from one moment to the next and for good; its key is wrapped
        by the newest data key then. Raises: as `open`, and SpillDiskFull."""
        ...

    def adopt(self, ticket: SpillTicket, keys: DataKeys, *, note: bytes = b"") -> SealedContext:
        """Take in a copy of a context from another tier, whose ticket for reading this is: the same
        sealed records under the same id. It is complete, and the context's own, from one moment to
        the next, as with `commit`. Raises: as `begin` and `commit`; nothing new is left then."""
        ...

    def abandon(self, ticket: SpillTicket) -> None:
        """Give up a spill that was not committed."""
        ...

    def open(self, owner: SpillOwner, spill: str, keys: DataKeys) -> SpillTicket:
        """A ticket for reading. Raises: SealedCacheUnknown where the owner has no such spill,
        SealedCacheErased when its key is gone, SealedCacheDamaged."""
        ...

    def delete(self, owner: SpillOwner, spill: str) -> None:
        """Destroy the spill's key, then its files. Where it raises SpillUnavailable or
        SpillDiskFull, call it again: it goes on. Raises: SealedCacheUnknown."""
        ...

    def delete_all(self, tenant: TenantId, tenant_uid: str) -> int:
        """Delete all spills of a tenant. Returns how many there were."""
        ...

    def listed(self, tenant: TenantId | None = None) -> Sequence[SealedContext]:
        """What is on disk, of one tenant or of all, oldest first. After a start: all that was
        committed before."""
        ...

    def close(self) -> None:
        """Let go of the disk. No other method works afterwards."""
        ...

    def used_bytes(self, tenant: TenantId) -> int:
        """Bytes of all files of the tenant's committed spills."""
        ...
