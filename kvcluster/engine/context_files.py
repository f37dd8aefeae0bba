"""The files of contexts: written, read, copied and destroyed in one tier off the GPUs, every byte
counted against the tenant's share of the tier before it is written. Engine process.
"""

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final

from kvcluster.cache.block_table import TableEntry
from kvcluster.cache.spill import PartReceipt, SealedContext, SpillOwner, SpillTicket
from kvcluster.cache.spill_folder import note_bytes
from kvcluster.engine.context import Context, SealedCopy
from kvcluster.engine.context_note import ContextNote, block_keys, note_of, read_note
from kvcluster.engine.parts import EngineParts
from kvcluster.engine.prefixes import Prefixes
from kvcluster.engine.restored_blocks import RestoredBlocks, stored_blocks
from kvcluster.engine.spill_plan import SpillRead, SpillWrite, num_parts
from kvcluster.engine.spill_sizes import SpillSizes
from kvcluster.engine.store_parts import SealedTier, StoreParts
from kvcluster.engine.tenant_keys import KeyRing
from kvcluster.errors import (
    ConfigError,
    QuotaExceeded,
    SealedCacheErased,
    SealedCacheUnknown,
    SpillError,
)
from kvcluster.tenancy.limits import Tier
from kvcluster.types import TenantId

_SECRET_BYTES: Final = 32


class ContextFiles:
    """Of one tier off the GPUs, whose ledger nobody else charges."""

    def __init__(
        self,
        name: Tier,
        sealed: SealedTier,
        parts: StoreParts,
        own: EngineParts,
        prefixes: Prefixes,
    ) -> None:
        """`name`: HOST or DISK. What is in HOST has not to be found after a restart."""
        self.name = name
        self._tier, self._ledger = sealed
        self._keys = parts.keys
        self._ranks = parts.ranks
        self._prefixes = prefixes
        self._spec = own.spec
        self._block_size = own.cache.block_size
        self._sizes = SpillSizes(own.spec, own.partitions, prefixes, self._block_size)

    def of(self, context: Context) -> SealedCopy:
        """What this tier has of a context."""
        return context.host if self.name is Tier.HOST else context.disk

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
        """All that is in the tier. Raises: SpillUnavailable."""
        return self._tier.listed()

    def most_bytes(self, context: Context) -> int:
        """Bytes that the files of a context as it is now do not exceed."""
        num_entries = len(context.keys.keys)
        most = self._sizes.most_bytes(context.tenant, context.policy, num_entries)
        return most + note_bytes(len(self._note(context)))

    async def write(self, context: Context, entries: Sequence[TableEntry]) -> None:
        """Write a context whose blocks are these, all of it, which stay what they are until this
        returns, in place of what the tier has of it.

        Raises: QuotaExceeded before anything is written, SealedCacheErased, SpillDiskFull,
        SpillUnavailable, RankLost; then nothing new is left.
        """
        ring, note = self._ring(context.tenant), self._note(context)
        await self._replace(
            context,
            self._write(context, entries, ring, note),
            most_bytes=self.most_bytes(context),
            version=context.content_version,
        )

    async def copy(self, context: Context, source: "ContextFiles") -> None:
        """Copy what another tier has of a context, in place of what this one has. Raises: as
        `write`, SealedCacheUnknown, SealedCacheDamaged."""
        found, ring = source.of(context), self._ring(context.tenant)
        assert found.spill is not None, "what is copied is there"
        ticket = await source.ticket(found.spill, ring)
        note = self._note(context)
        num_bytes = sum(receipt.num_bytes for receipt in ticket.receipts)
        await self._replace(
            context,
            self._adopt(ticket, ring, note),
            most_bytes=num_bytes + note_bytes(len(note)),
            version=found.version,
        )

    async def _replace(
        self,
        context: Context,
        writing: Coroutine[Any, Any, SealedContext],
        *,
        most_bytes: int,
        version: int,
    ) -> None:
        """Charge the most that may be written, write, and settle. Raises: QuotaExceeded before
        anything is written, and what `writing` does."""
        try:
            self._take(context.tenant, most_bytes)
        except QuotaExceeded:
            writing.close()
            raise
        give_back, copy = most_bytes, self.of(context)
        try:
            sealed = await writing
            assert sealed.num_bytes <= most_bytes, "files are no longer than was charged"
            earlier, copy.spill = copy.num_bytes, sealed
            copy.version, copy.error = version, None
            give_back = most_bytes - sealed.num_bytes + earlier
        finally:
            self._ledger.give_back(context.tenant, 0, give_back)

    async def _adopt(self, ticket: SpillTicket, ring: KeyRing, note: bytes) -> SealedContext:
        return await asyncio.to_thread(self._tier.adopt, ticket, ring.keys, note=note)

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
        found, ring = self.of(context), self._ring(context.tenant)
        assert found.spill is not None, "what is read is there"
        ticket = await self.ticket(found.spill, ring)
        names = block_keys(
            _secret(ticket), context.tokens, self._spec, context.policy, self._block_size
        )
        await self._ranks.read_spill(
            SpillRead(ticket, blocks.stored(names), blocks.missing, self._sizes.entries_at_once)
        )

    async def ticket(self, sealed: SealedContext, ring: KeyRing) -> SpillTicket:
        """For reading. Raises: as `SpillTier.open`."""
        return await asyncio.to_thread(self._tier.open, sealed.owner, sealed.spill, ring.keys)

    async def write_note(self, context: Context) -> None:
        """Put what is known of a context now in place of what its note says. Raises: as `write`."""
        assert context.disk.spill is not None, "what has a note is on disk"
        ring, note = self._ring(context.tenant), self._note(context)
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
        is_known = ring is not None and ring.uid == sealed.owner.tenant_uid
        if ring is None or not (is_known or sealed.is_damaged):
            return None
        return read_note(self._tier.read_note(sealed.owner, sealed.spill, ring.keys))

    async def destroy(self, sealed: SealedContext) -> None:
        """Destroy the key of a context in this tier, then its files. Again changes nothing. Raises:
        SpillUnavailable, SpillDiskFull."""
        try:
            await asyncio.to_thread(self._tier.delete, sealed.owner, sealed.spill)
        except SealedCacheUnknown:
            return
        self._ledger.give_back(sealed.owner.tenant, 0, sealed.num_bytes)

    async def drop(self, context: Context) -> None:
        """Destroy what the tier has of a context, if anything. Raises: as `destroy`."""
        copy = self.of(context)
        if copy.spill is not None:
            await self.destroy(copy.spill)
            copy.spill = None

    def close(self) -> None:
        """Let go of the tier. In HOST nothing is left."""
        self._tier.close()

    def _note(self, context: Context) -> bytes:
        if self.name is Tier.HOST:
            return b""
        return note_of(context, self._spec, self._block_size)

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
        quota = f"partitions.{self.name.value}"
        raise QuotaExceeded(
            f"{quota}: {use.used_bytes} of the tenant's {limit} bytes are used, and up to "
            f"{num_bytes} more do not fit: delete a context",
            metadata={
                "quota": f"{quota}.limit_bytes",
                "used": str(use.used_bytes),
                "limit": str(limit),
            },
        )


def _secret(ticket: SpillTicket) -> bytes:
    """Keys the names of the blocks of one spill."""
    return hashlib.blake2b(b"block names", key=ticket.key, digest_size=_SECRET_BYTES).digest()
