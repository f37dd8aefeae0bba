"""What tenants' data keys mean for contexts: those whose key was destroyed go, from all tiers, and
those on disk whose key became known are found. Engine process.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvcluster.cache.spill import SealedContext
from kvcluster.engine.context import Context
from kvcluster.engine.context_files import ContextFiles
from kvcluster.engine.engine import Engine
from kvcluster.engine.found_contexts import found_context
from kvcluster.engine.tenant_keys import TenantKeys
from kvcluster.log import get_logger
from kvcluster.tenancy.limits import Tier
from kvcluster.tenancy.shares import TenantShares

_KNOWN_S = 5.0
"""Longest wait for the keys of tenants after a start."""

log = get_logger(__name__)


class KeyedContexts:
    """Of one engine. Used in one event loop."""

    def __init__(
        self,
        engine: Engine,
        keys: TenantKeys,
        tiers: Sequence[ContextFiles],
        *,
        wake: Callable[[], None],
    ) -> None:
        """Counts what is on disk, and takes in the contexts whose keys are known. Raises:
        ConfigError, SpillUnavailable."""
        self._engine = engine
        self._contexts = engine.contexts
        self._keys = keys
        self._tiers = tiers
        self._wake = wake
        self._disk = next((files for files in tiers if files.name is Tier.DISK), None)
        self._applying = asyncio.Lock()
        if self._disk is not None:
            self._disk.charge_found()
        self._adopt(self._found())
        self._is_known = asyncio.Event()
        if self._keys.are_told:
            self._is_known.set()

    async def wait_known(self) -> None:
        """Return when the contexts on disk are known, or that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_KNOWN_S):
                await self._is_known.wait()

    async def apply(self, shares: TenantShares) -> None:
        """Take in tenants' data keys. Raises: SpillUnavailable, SpillDiskFull."""
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
        for files in self._tiers:
            for sealed in await asyncio.to_thread(files.listed):
                if self._keys.are_destroyed(sealed):
                    await self._destroy(sealed, files)
        self._adopt(await asyncio.to_thread(self._found))
        self._is_known.set()
        self._wake()

    async def _destroy(self, sealed: SealedContext, files: ContextFiles) -> None:
        """Raises: SpillUnavailable, SpillDiskFull."""
        for context in self._contexts.of(sealed.owner.tenant):
            copy = files.of(context)
            if copy.spill is not None and copy.spill.spill == sealed.spill:
                self._contexts.delete(context)
                while not context.disk.is_clear:
                    await context.changed.wait()
                    if copy.spill is not None and context.disk.error is not None:
                        raise context.disk.error
                break
        else:
            await files.destroy(sealed)
        log.info("context_erased", tenant=sealed.owner.tenant, tier=files.name.value)

    def _found(self) -> list[Context]:
        """Contexts on disk that are not known yet, and whose keys are. Blocks on the disk. Raises:
        SpillUnavailable."""
        disk = self._disk
        if disk is None:
            return []
        known = {each.disk.spill.spill for each in self._contexts.all() if each.disk.spill}
        unknown = [sealed for sealed in disk.listed() if sealed.spill not in known]
        made = (
            found_context(sealed, disk, self._engine.parts, self._engine.prefixes)
            for sealed in unknown
        )
        return [context for context in made if context is not None]

    def _adopt(self, found: Sequence[Context]) -> None:
        for context in found:
            self._contexts.adopt(context)
