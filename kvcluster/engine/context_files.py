"""The files of contexts: written, read and destroyed on the disk tier, every byte counted against
the tenant's share of the disk before it is written. Engine process.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from kvcluster.cache.block_table import TableEntry
from kvcluster.cache.spill import PartReceipt, SealedContext, SpillOwner, SpillTicket
from kvcluster.cache.spill_disk import note_bytes
from kvcluster.engine.context import Context
from kvcluster.engine.context_note import ContextNote, block_keys, note_of, read_note
from kvcluster.engine.disk_parts import DiskParts
from kvcluster.engine.prefixes import Prefixes
from kvcluster.engine.restored_blocks import RestoredBlocks, stored_blocks
from kvcluster.engine.spill_plan import SpillRead, SpillWrite, num_parts
from kvcluster.engine.spill_sizes import SpillSizes
from kvcluster.engine.tenant_keys import KeyRing
from kvcluster.errors import (
    ConfigError,
    QuotaExceeded,
    SealedCacheErased,
    SealedCacheUnknown,
    SpillError,
)
from kvcluster.types import ModelSpec, TenantId

_SECRET_BYTES: Final = 32


class ContextFiles:
    """The only one who charges the disk's ledger."""

    def __init__(
        self,
        parts: DiskParts,
        prefixes: Prefixes,
        spec: ModelSpec,
        *,
        sizes: SpillSizes,
        block_size: int,
    ) -> None:
        self._tier = parts.tier
        self._ledger = parts.ledger
        self._keys = parts.keys
        self._ranks = parts.ranks
        self._prefixes = prefixes
        self._spec = spec
        self._sizes = sizes
        self._block_size = block_size

    def charge_found(self) -> None:
        """Count what is on disk already. Raises: ConfigError when it is more than the tier has,
        SpillUnavailable."""
        listed = self._tier.listed()
        for sealed in listed:
            if not self._ledger.take(sealed.owner.tenant, 0, sealed.num_bytes):
                num_bytes = sum(each.num_bytes for each in listed)
                raise ConfigError(
                    f"spill.capacity_bytes: contexts of {num_bytes} bytes are on disk already: "
                    f"want at least that, got {self._ledger.total_bytes}"
                )

    def listed(self) -> Sequence[SealedContext]:
        """All that is on disk. Raises: SpillUnavailable."""
        return self._tier.listed()

    async def write(self, context: Context, entries: Sequence[TableEntry]) -> None:
        """Write a context whose blocks are these, which stay what they are until this returns, in
        place of what is on disk of it.

        Raises: QuotaExceeded before anything is written, SealedCacheErased, SpillDiskFull,
        SpillUnavailable, RankLost; then nothing new is left.
        """
        ring, version = self._ring(context.tenant), context.content_version
        note = note_of(context, self._spec, self._block_size)
        most = self._sizes.most_bytes(context.tenant, context.policy, len(entries))
        most += note_bytes(len(note))
        self._take(context.tenant, most)
        give_back = most
        try:
            sealed = await self._write(context, entries, ring, note)
            assert sealed.num_bytes <= most, "files are no longer than was charged"
            earlier, context.disk.spill = context.disk.spill, sealed
            context.disk.version, context.disk.error = version, None
            give_back = most - sealed.num_bytes + (0 if earlier is None else earlier.num_bytes)
        finally:
            self._ledger.give_back(context.tenant, 0, give_back)

    async def _write(
        self, context: Context, entries: Sequence[TableEntry], ring: KeyRing, note: bytes
    ) -> SealedContext:
        per_part, policy = self._sizes.entries_at_once, context.policy
        forms, tokens = self._prefixes.forms(policy), context.tokens
        count = num_parts(stored_blocks(entries, forms, ()), self._sizes.num_ranks, per_part)
        owner = SpillOwner(tenant=context.tenant, tenant_uid=ring.uid, context=context.id)
        ticket = await asyncio.to_thread(self._tier.begin, owner, ring.keys, num_parts=count)
        try:
            names = block_keys(_secret(ticket), tokens, self._spec, policy, self._block_size)
            receipts: Sequence[PartReceipt] = ()
            if count:
                order = SpillWrite(ticket, stored_blocks(entries, forms, names), per_part)
                receipts = await self._ranks.write_spill(order)
            return await asyncio.to_thread(
                self._tier.commit, ticket, receipts, ring.keys, note=note
            )
        except BaseException:
            # What cannot be removed now is swept at the next start.
            with suppress(SpillError):
                self._tier.abandon(ticket)
            raise

    async def read(self, context: Context, blocks: RestoredBlocks) -> None:
        """Have the ranks read what is missing of a context into its blocks.

        Raises: SealedCacheDamaged, SealedCacheErased, SealedCacheUnknown, SavedCacheMismatch,
        SpillUnavailable, RankLost.
        """
        assert context.disk.spill is not None, "what is read is on disk"
        ring, spill = self._ring(context.tenant), context.disk.spill
        ticket = await asyncio.to_thread(self._tier.open, spill.owner, spill.spill, ring.keys)
        names = block_keys(
            _secret(ticket), context.tokens, self._spec, context.policy, self._block_size
        )
        await self._ranks.read_spill(
            SpillRead(ticket, blocks.stored(names), blocks.missing, self._sizes.entries_at_once)
        )

    async def write_note(self, context: Context) -> None:
        """Put what is known of a context now in place of what its note says. Raises: as `write`."""
        assert context.disk.spill is not None, "what has a note is on disk"
        ring, note = self._ring(context.tenant), note_of(context, self._spec, self._block_size)
        before = context.disk.spill
        self._take(context.tenant, note_bytes(len(note)))
        give_back = note_bytes(len(note))
        try:
            context.disk.spill = await asyncio.to_thread(
                self._tier.replace_note, before.owner, before.spill, ring.keys, note
            )
            give_back += before.num_bytes - context.disk.spill.num_bytes
            context.disk.error = None
        finally:
            self._ledger.give_back(context.tenant, 0, give_back)

    def read_note(self, sealed: SealedContext) -> ContextNote | None:
        """What is known of a context on disk; None: its keys are not known now. Blocks on the disk.

        Raises: SealedCacheDamaged, SealedCacheErased, SpillUnavailable.
        """
        ring = self._keys.of(sealed.owner.tenant)
        if ring is None or ring.uid != sealed.owner.tenant_uid:
            return None
        return read_note(self._tier.read_note(sealed.owner, sealed.spill, ring.keys))

    async def destroy(self, sealed: SealedContext) -> None:
        """Destroy the key of a context on disk, then its files. Again changes nothing. Raises:
        SpillUnavailable, SpillDiskFull."""
        try:
            await asyncio.to_thread(self._tier.delete, sealed.owner, sealed.spill)
        except SealedCacheUnknown:
            return
        self._ledger.give_back(sealed.owner.tenant, 0, sealed.num_bytes)

    def _ring(self, tenant: TenantId) -> KeyRing:
        ring = self._keys.of(tenant)
        if ring is None:
            raise SealedCacheErased(f"no data key of tenant {tenant} is known")
        return ring

    def _take(self, tenant: TenantId, num_bytes: int) -> None:
        """Raises: QuotaExceeded."""
        if self._ledger.take(tenant, 0, num_bytes):
            return
        use = self._ledger.use(tenant)
        limit = min(use.share.limit_bytes, self._ledger.total_bytes)
        raise QuotaExceeded(
            f"partitions.disk: {use.used_bytes} of the tenant's {limit} bytes are used, and up to "
            f"{num_bytes} more do not fit: delete a context",
            metadata={
                "quota": "partitions.disk.limit_bytes",
                "used": str(use.used_bytes),
                "limit": str(limit),
            },
        )


def _secret(ticket: SpillTicket) -> bytes:
    """Keys the names of the blocks of one spill."""
    return hashlib.blake2b(b"block names", key=ticket.key, digest_size=_SECRET_BYTES).digest()
