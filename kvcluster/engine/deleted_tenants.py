"""Tenants that were deleted leave nothing in an engine's memory: a later tenant may have their id.

Routers tell which tenants are deleted, again and again until these are purged, and the uid of every
other one: so what came while a tenant was deleted goes too, and so does what is left of a tenant
whose id is another's now. What is on disk and in the host's memory is `keyed_contexts`' to destroy.
"""

import asyncio
from asyncio import Event
from collections.abc import Callable

from kvcluster.engine.engine import Engine
from kvcluster.log import get_logger
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import TenantId

log = get_logger(__name__)


class DeletedTenants:
    """Of one engine. Used in one event loop."""

    def __init__(self, engine: Engine, *, wake: Callable[[], None]) -> None:
        """`wake` tells whoever runs the engine that it has changed."""
        self._engine = engine
        self._wake = wake
        self._uids: dict[TenantId, str] = {}
        """Whose what is here is, as far as it was told."""
        self._revision = -1

    async def apply(self, shares: TenantShares) -> None:
        """Return when nothing is on the ranks of tenants that were deleted by then. What is older
        than what was applied changes nothing."""
        if shares.revision < self._revision:
            return
        self._revision = shares.revision
        told = {share.tenant: share.tenant_uid for share in shares.shares} | dict(shares.deleted)
        gone = {tenant for tenant, _ in shares.deleted}
        gone |= {name for name, uid in self._uids.items() if told.get(name, uid) != uid}
        self._uids |= told
        # Long ago deleted ones are told too.
        gone &= self._engine.tenants_here()
        await asyncio.gather(*map(self._erase, gone))

    async def _erase(self, tenant: TenantId) -> None:
        engine, contexts = self._engine, self._engine.contexts.of(tenant)
        for record in engine.records(tenant):
            engine.cancel(record.generation)
        for context in contexts:
            engine.contexts.delete(context)
        engine.forget(tenant)
        cache, are_dropped, are_freed = engine.prefixes.cache(tenant), Event(), Event()
        engine.zeroing.add(cache.shared, cache.drop_all(), are_dropped.set)
        # What was running has kept nothing.
        engine.zeroing.flush(are_freed.set)
        self._wake()
        await are_dropped.wait()
        await are_freed.wait()
        for context in contexts:
            while not context.is_zeroed:
                await context.changed.wait()
        log.info("tenant_erased", tenant=tenant, num_contexts=len(contexts))
