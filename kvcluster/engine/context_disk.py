"""Contexts on disk: written when they are computed, found again after a start, read when they are
wanted. Engine process; the ranks carry the bytes (`spill_plan.SpillRanks`).

A context is written once all of it is computed, one after the other, while steps go on. From the
moment when its record names the disk, it survives a kill of every process.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kvcluster.cache.block_table import TableEntry
from kvcluster.cache.spill import SealedContext
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextState
from kvcluster.engine.context_checks import unreadable
from kvcluster.engine.context_files import ContextFiles
from kvcluster.engine.disk_parts import DiskParts
from kvcluster.engine.engine import Engine
from kvcluster.engine.found_contexts import found_context
from kvcluster.engine.restored_blocks import RestoredBlocks
from kvcluster.engine.spill_sizes import SpillSizes
from kvcluster.engine.stream import Signal
from kvcluster.errors import (
    ContextNotReady,
    KvClusterError,
    RankLost,
    SavedCacheMismatch,
    SealedCacheDamaged,
    SealedCacheErased,
    SealedCacheUnknown,
    SpillError,
)
from kvcluster.log import get_logger
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import PUBLISHED, TenantId

_RETRY_S = 2.0
"""Pause before what could not be destroyed is tried again."""

_ENTRIES_AT_ONCE = 256
"""Whose blocks are taken without a pause: some 10 ms."""
_KNOWN_S = 5.0
"""Longest wait for the keys of tenants after a start."""

log = get_logger(__name__)


class ContextDisk:
    """A `ContextKeeper`. Used in one event loop."""

    def __init__(self, engine: Engine, parts: DiskParts, *, wake: Callable[[], None]) -> None:
        """Counts what is on disk, and takes in the contexts whose keys are known. `wake` tells
        whoever runs the engine that it has changed. Raises: ConfigError, SpillUnavailable."""
        self._engine = engine
        self._contexts = engine.contexts
        self._keys = parts.keys
        self._wake = wake
        own = engine.parts
        self._prefixes = engine.prefixes
        self._files = ContextFiles(
            parts,
            self._prefixes,
            own.spec,
            sizes=SpillSizes(own.spec, own.partitions, self._prefixes, own.cache.block_size),
            block_size=own.cache.block_size,
        )
        self._unsaved: dict[str, Context] = {}
        """By uid, in the order in which they are written."""
        self._saving: Context | None = None
        self._has_unsaved = asyncio.Event()
        self._applying = asyncio.Lock()
        self._changed = Signal()
        self._locks: dict[str, asyncio.Lock] = {}
        """By uid: held while something of the context is written, read or destroyed."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._tier = parts.tier
        self._files.charge_found()
        self._contexts.keeper = self
        self._adopt([found for found in map(self._found, self._files.listed()) if found])
        self._is_known = asyncio.Event()
        if self._keys.are_told:
            self._is_known.set()

    def start(self) -> None:
        """Begin to write. Call it once, inside the event loop."""
        self._spawn(self._save_all())

    async def stop(self) -> None:
        """End all tasks. What is not written by then is not kept."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tier.close()

    async def wait_idle(self) -> None:
        """Return when all that is to be written is, or could not be."""
        while self._unsaved or self._saving is not None:
            await self._changed.wait()

    async def wait_known(self) -> None:
        """Return when the contexts on disk are known, or that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_KNOWN_S):
                await self._is_known.wait()

    async def wait_saved(self, context: Context) -> None:
        """Return when what is to be written of the context is, or could not be."""
        while context.uid in self._unsaved or self._saving is context:
            await self._changed.wait()

    async def apply(self, shares: TenantShares) -> None:
        """Take in tenants' data keys: contexts whose key was destroyed go, in memory and on disk;
        those whose key became known are found. Raises: SpillUnavailable."""
        async with self._applying:
            before = self._keys.revision
            if not self._keys.apply(shares):
                return
            try:
                await self._look(shares)
            except BaseException:
                # The next push, with the same keys, tries again.
                self._keys.revision = before
                raise

    async def _look(self, shares: TenantShares) -> None:
        for tenant, _ in shares.deleted:
            for context in self._contexts.of(tenant):
                self._contexts.delete(context)
        listed = await asyncio.to_thread(self._files.listed)
        doomed = [sealed for sealed in listed if self._keys.are_destroyed(sealed)]
        for sealed in doomed:
            await self._destroy(sealed)
        known = {each.disk.spill.spill for each in self._contexts.all() if each.disk.spill}
        unknown = [each for each in listed if each not in doomed and each.spill not in known]
        found = await asyncio.to_thread(lambda: list(filter(None, map(self._found, unknown))))
        self._adopt(found)
        self._is_known.set()
        self._wake()

    async def bring(self, context: Context) -> None:
        """Have the context's blocks in memory, if they are on disk.

        Raises: QuotaExceeded, ClusterOverloaded when they do not fit, SealedCacheDamaged,
        ContextNotReady when this model or calibration cannot read them, SpillUnavailable, RankLost.
        """
        if not self._is_wanted(context):
            return
        async with self._lock(context):
            if not self._is_wanted(context):
                return
            try:
                await self._read(context)
            except (SealedCacheDamaged, SealedCacheErased, SealedCacheUnknown) as error:
                context.state, context.message = ContextState.DAMAGED, error.message
                context.note_change(self._engine.parts.clock.unix())
                log.error("context_damaged", tenant=context.tenant, error=type(error).__name__)
                raise unreadable(context) from error
            except SavedCacheMismatch as error:
                raise ContextNotReady(
                    f"context {context.id} cannot be read here: {error.message}"
                ) from error

    def note_built(self, context: Context) -> None:
        if context.tenant == PUBLISHED:
            # Nobody's key would seal it. Routers keep what is published, and publish it again.
            return
        self._unsaved.setdefault(context.uid, context)
        self._has_unsaved.set()

    def note_changed(self, context: Context) -> None:
        if context.disk.spill is not None:
            self.note_built(context)

    def drop(self, context: Context) -> None:
        context.disk.is_clear = False
        self._unsaved.pop(context.uid, None)
        self._changed.notify()
        self._spawn(self._drop(context))

    def _is_wanted(self, context: Context) -> bool:
        """Whether a context is on disk and not in memory."""
        if context.state is not ContextState.ACTIVE or not context.is_on_disk:
            return False
        return len(self._held(context)) < len(context.keys.keys)

    def _held(self, context: Context) -> list[TableEntry]:
        return self._prefixes.held_at(context.tenant, context.keys, context.tokens, context.policy)

    async def _read(self, context: Context) -> None:
        engine, epoch = self._engine, self._engine.epoch
        self._check_ring(epoch)
        cache = self._prefixes.cache(context.tenant)
        num_tokens = len(context.tokens)
        blocks = RestoredBlocks(
            context,
            cache,
            engine.parts.partitions.of(context.tenant),
            self._prefixes.forms(context.policy),
            is_spread=num_tokens >= engine.parts.config.shard_min_tokens,
        )
        try:
            while blocks.take(_ENTRIES_AT_ONCE):
                # Steps are planned meanwhile.
                await asyncio.sleep(0)
            self._check_ring(epoch)
            await self._zeroed()
            await self._files.read(context, blocks)
            self._check_ring(epoch)
            if context.state is ContextState.ACTIVE:
                blocks.keep()
                self._contexts.hold(context)
        finally:
            blocks.release()
            self._wake()
        if context.state is not ContextState.ACTIVE:
            # Whoever deletes it waits until its blocks are zero.
            await self._zeroed()
            raise unreadable(context)
        log.info("context_read", tenant=context.tenant, num_blocks=len(blocks.missing))

    def _check_ring(self, epoch: int) -> None:
        """Raises: RankLost, Draining, when the ranks are not those of this epoch."""
        if self._engine.refusal is not None:
            raise self._engine.refusal
        if self._engine.epoch != epoch:
            raise RankLost("the ring was started again: try again", retry_after_s=_RETRY_S)

    async def _zeroed(self) -> None:
        """Return when the ranks have zeroed all that was free or taken before."""
        done = asyncio.Event()
        self._engine.zeroing.flush(done.set)
        self._wake()
        await done.wait()

    async def _save_all(self) -> None:
        while True:
            while self._unsaved:
                self._saving = self._unsaved.pop(next(iter(self._unsaved)))
                try:
                    await self._save(self._saving)
                finally:
                    self._saving = None
                    self._changed.notify()
            self._has_unsaved.clear()
            await self._has_unsaved.wait()

    async def _save(self, context: Context) -> None:
        try:
            async with self._lock(context):
                if context.state is not ContextState.ACTIVE:
                    return
                if context.is_on_disk:
                    await self._files.write_note(context)
                else:
                    with self._kept(context) as entries:
                        await self._files.write(context, entries)
        except KvClusterError as error:
            context.disk.error = error
            log.warning("context_not_on_disk", tenant=context.tenant, error=type(error).__name__)
        context.changed.notify()

    @contextmanager
    def _kept(self, context: Context) -> Iterator[list[TableEntry]]:
        """The context's blocks, which stay what they are inside the `with` block. Raises:
        ContextNotReady."""
        entries, codec = self._held(context), context.policy.storage
        if len(entries) < len(context.keys.keys):
            raise ContextNotReady("its blocks were given up before they could be written")
        shared = self._prefixes.cache(context.tenant).shared
        for entry in entries:
            shared.retain(codec, entry)
        try:
            yield entries
        finally:
            for entry in entries:
                shared.release(codec, entry)
            # Somebody may wait for them to be zeroed.
            self._wake()

    async def _drop(self, context: Context) -> None:
        async with self._lock(context):
            while context.disk.spill is not None:
                try:
                    await self._files.destroy(context.disk.spill)
                    context.disk.spill = None
                except SpillError as error:
                    context.disk.error = error
                    context.changed.notify()
                    await asyncio.sleep(_RETRY_S)
        self._locks.pop(context.uid, None)
        context.disk.is_clear = True
        self._contexts.forget_deleted(context)

    async def _destroy(self, sealed: SealedContext) -> None:
        """Raises: SpillUnavailable, SpillDiskFull."""
        for context in self._spilled(sealed.owner.tenant):
            if context.disk.spill is not None and context.disk.spill.spill == sealed.spill:
                self._contexts.delete(context)
                while not context.disk.is_clear:
                    await context.changed.wait()
                    if context.disk.spill is not None and context.disk.error is not None:
                        raise context.disk.error
                break
        else:
            await self._files.destroy(sealed)
        log.info("context_erased", tenant=sealed.owner.tenant)

    def _spilled(self, tenant: TenantId | None = None) -> list[Context]:
        return [
            context
            for context in self._contexts.all()
            if context.disk.spill is not None and tenant in (None, context.tenant)
        ]

    def _found(self, sealed: SealedContext) -> Context | None:
        """A context on disk; None: its keys are not known. Blocks on the disk."""
        return found_context(sealed, self._files, self._engine.parts, self._prefixes)

    def _adopt(self, found: list[Context]) -> None:
        for context in found:
            self._contexts.adopt(context)

    def _lock(self, context: Context) -> asyncio.Lock:
        return self._locks.setdefault(context.uid, asyncio.Lock())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("context_disk_failed", exc_info=task.exception())
