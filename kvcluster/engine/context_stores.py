"""Contexts off the GPUs: in the host's memory and on disk, written when they are computed, found on
disk after a start, read when they are wanted. Engine process; the ranks carry the bytes
(`spill_plan.SpillRanks`).

A context is written once all of it is computed, one after the other, while steps go on: into the
host's memory where the engine has that tier and the tenant room there, else to disk; to both where
an upload asked for it. So the GPUs can give its blocks up at any time, and it comes back from the
fastest tier that has it. When others want the host's memory (`host_room`), it moves to disk, as it
is sealed. From the moment when its record names the disk, it survives a kill of every process.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from kvcluster.cache.block_table import TableEntry
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextState
from kvcluster.engine.context_checks import unreadable
from kvcluster.engine.context_files import ContextFiles
from kvcluster.engine.engine import Engine
from kvcluster.engine.host_room import HostRoom
from kvcluster.engine.keyed_contexts import KeyedContexts
from kvcluster.engine.restored_blocks import RestoredBlocks
from kvcluster.engine.store_parts import SealedTier, StoreParts
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
from kvcluster.tenancy.limits import Tier
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import PUBLISHED, TenantId

_RETRY_S = 2.0
"""Pause before what could not be destroyed is tried again."""

_ENTRIES_AT_ONCE = 256
"""Whose blocks are taken without a pause: some 10 ms."""

log = get_logger(__name__)


class ContextStores:
    """A `ContextKeeper`. Used in one event loop."""

    def __init__(self, engine: Engine, parts: StoreParts, *, wake: Callable[[], None]) -> None:
        """Counts what is on disk, and takes in the contexts whose keys are known. `wake` tells
        whoever runs the engine that it has changed. Raises: ConfigError, SpillUnavailable."""
        self._engine = engine
        self._contexts = engine.contexts
        self._wake = wake
        self._prefixes = engine.prefixes
        self._host = self._files_of(Tier.HOST, parts.host, parts)
        self._disk = self._files_of(Tier.DISK, parts.disk, parts)
        self._unsaved: dict[str, Context] = {}
        """By uid, in the order in which they are written."""
        self._renamed: set[str] = set()
        """Uids of those whose note on disk is to be written again."""
        self._saving: Context | None = None
        self._has_unsaved = asyncio.Event()
        self._changed = Signal()
        self._locks: dict[str, asyncio.Lock] = {}
        """By uid: held while something of the context is written, read or destroyed."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._room: HostRoom | None = None
        if parts.host is not None:
            self._room = HostRoom(
                parts.host.ledger,
                self._contexts,
                is_busy=lambda context: self._lock(context).locked(),
                leave=self._leave_host,
                shrink=lambda tenant: self._spawn(self._shrink(tenant)),
            )
        self._contexts.keeper = self
        self._keyed = KeyedContexts(engine, parts.keys, self._all_files(), wake=wake)

    def _files_of(
        self, name: Tier, sealed: SealedTier | None, parts: StoreParts
    ) -> ContextFiles | None:
        if sealed is None:
            return None
        return ContextFiles(name, sealed, parts, self._engine.parts, self._prefixes)

    @property
    def has_disk(self) -> bool:
        """Whether a context can survive the end of the engine."""
        return self._disk is not None

    def start(self) -> None:
        """Begin to write. Call it once, inside the event loop."""
        self._spawn(self._save_all())

    async def stop(self) -> None:
        """End all tasks. What is not written by then is not kept."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for files in self._all_files():
            files.close()

    async def wait_idle(self) -> None:
        """Return when all that is to be written is, or could not be."""
        while self._unsaved or self._saving is not None:
            await self._changed.wait()

    async def wait_known(self) -> None:
        """Return when the contexts on disk are known, or that takes too long."""
        await self._keyed.wait_known()

    async def wait_saved(self, context: Context) -> None:
        """Return when what is to be written of the context is, or could not be."""
        while context.uid in self._unsaved or self._saving is context:
            await self._changed.wait()

    async def apply(self, shares: TenantShares) -> None:
        """Take in tenants' data keys: see `KeyedContexts.apply`."""
        await self._keyed.apply(shares)

    async def bring(self, context: Context) -> None:
        """Have the context's blocks in the ranks' memory, if they are off the GPUs.

        Raises: QuotaExceeded, ClusterOverloaded when they do not fit, SealedCacheDamaged,
        ContextNotReady when this model or calibration cannot read them, SpillUnavailable, RankLost.
        """
        if not self._is_wanted(context):
            return
        async with self._lock(context):
            if not self._is_wanted(context):
                return
            try:
                await self._read_fastest(context)
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
            self._renamed.add(context.uid)
            self.note_built(context)

    def drop(self, context: Context) -> None:
        context.disk.is_clear = False
        # From now on it says why something is still there, and no longer why it is not.
        context.disk.error = None
        self._unsaved.pop(context.uid, None)
        self._changed.notify()
        self._spawn(self._drop(context))

    def _is_wanted(self, context: Context) -> bool:
        """Whether a context is off the GPUs and not on them."""
        is_stored = context.is_on_host or context.is_on_disk
        if context.state is not ContextState.ACTIVE or not is_stored:
            return False
        return len(self._held(context)) < len(context.keys.keys)

    def _held(self, context: Context) -> list[TableEntry]:
        return self._prefixes.held_at(context.tenant, context.keys, context.tokens, context.policy)

    async def _read_fastest(self, context: Context) -> None:
        """Raises: as `bring` and `ContextFiles.read`."""
        if self._host is not None and context.is_on_host:
            try:
                await self._read(context, self._host)
                return
            except SpillError as error:
                if not context.is_on_disk:
                    raise
                log.warning("host_copy_lost", tenant=context.tenant, error=type(error).__name__)
                await self._host.drop(context)
        assert self._disk is not None, "it is somewhere"
        await self._read(context, self._disk)
        if self._host is not None:
            # The next time, it is nearer.
            self.note_built(context)

    async def _read(self, context: Context, files: ContextFiles) -> None:
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
            await files.read(context, blocks)
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
        tier, num_blocks = files.name.value, len(blocks.missing)
        log.info("context_read", tenant=context.tenant, tier=tier, num_blocks=num_blocks)

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
        async with self._lock(context):
            if context.state is not ContextState.ACTIVE:
                return
            if self._host is not None and not context.is_on_host:
                await self._save_in(self._host, self._save_on_host(context), context)
            if self._disk is not None and self._belongs_on_disk(context):
                await self._save_in(self._disk, self._save_on_disk(context), context)
        context.changed.notify()

    def _belongs_on_disk(self, context: Context) -> bool:
        """Whoever asked for it gets it there, a state on disk is not left behind, and what has no
        room in the host's memory has no other place."""
        is_there_in_part = context.disk.spill is not None
        return context.disk.is_awaited or is_there_in_part or not context.is_on_host

    async def _save_in(
        self, files: ContextFiles, saving: Coroutine[Any, Any, None], context: Context
    ) -> None:
        try:
            await saving
        except KvClusterError as error:
            files.of(context).error = error
            log.warning(
                "context_not_kept",
                tenant=context.tenant,
                tier=files.name.value,
                error=type(error).__name__,
            )

    async def _save_on_host(self, context: Context) -> None:
        """Raises: as `ContextFiles.write`, ContextNotReady."""
        assert self._host is not None
        assert self._room is not None
        # An earlier state of it is no use to anybody, and takes room.
        await self._host.drop(context)
        await self._room.make(context.tenant, self._host.most_bytes(context))
        with self._kept(context) as entries:
            await self._host.write(context, entries)

    async def _save_on_disk(self, context: Context) -> None:
        """Raises: as `ContextFiles.write`, ContextNotReady."""
        assert self._disk is not None
        if context.is_on_disk:
            if context.uid in self._renamed:
                await self._disk.write_note(context)
        elif self._host is not None and context.is_on_host:
            await self._disk.copy(context, self._host)
        else:
            with self._kept(context) as entries:
                await self._disk.write(context, entries)
        self._renamed.discard(context.uid)

    async def _leave_host(self, context: Context) -> None:
        """Move a context from the host's memory to disk, if there is one with room; else what is
        not on the GPUs is computed again when it is wanted. Raises: SpillError."""
        assert self._host is not None
        async with self._lock(context):
            is_moved = context.is_on_host and not context.is_on_disk
            if self._disk is not None and is_moved and context.state is ContextState.ACTIVE:
                await self._save_in(self._disk, self._disk.copy(context, self._host), context)
            await self._host.drop(context)
        context.changed.notify()

    async def _shrink(self, tenant: TenantId) -> None:
        assert self._room is not None
        await self._room.keep_limit(tenant)

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
            for files in self._all_files():
                while files.of(context).spill is not None:
                    try:
                        await files.drop(context)
                    except SpillError as error:
                        context.disk.error = error
                        context.changed.notify()
                        await asyncio.sleep(_RETRY_S)
        self._locks.pop(context.uid, None)
        context.disk.is_clear = True
        self._contexts.forget_deleted(context)

    def _all_files(self) -> list[ContextFiles]:
        return [files for files in (self._host, self._disk) if files is not None]

    def _lock(self, context: Context) -> asyncio.Lock:
        return self._locks.setdefault(context.uid, asyncio.Lock())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("context_stores_failed", exc_info=task.exception())
