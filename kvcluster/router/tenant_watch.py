"""Makes what an operator decided hold for what runs already, at this router and in the engines.

New calls are refused at once, because each one asks the store. What runs is looked after here, a
few times a second: calls of a suspended tenant or a revoked key end, generations of a tenant that
is halted are cancelled.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvcluster.engine.api import Backend, GenerationState
from kvcluster.errors import KvClusterError, StoreUnavailable
from kvcluster.log import get_logger
from kvcluster.router.open_calls import OpenCalls
from kvcluster.router.share_pushes import SharePushes
from kvcluster.tenancy.directory import TenantDirectory
from kvcluster.tenancy.shares import TierBytes
from kvcluster.tenancy.store import TenantStore
from kvcluster.tenancy.tenant import Act, TenantState
from kvcluster.types import TenantId

LOOK_INTERVAL_S = 0.25
_PURGE_INTERVAL_S = 600.0
_SWEEPS = 3
"""Looks at which a halted tenant's generations are cancelled: one that was let in just before
reaches its engine a moment later."""
_UNFINISHED = (GenerationState.QUEUED, GenerationState.RUNNING)

_log = get_logger(__name__)


class TenantWatch:
    """Of one router. `calls`: the open ones of each of its listeners."""

    def __init__(
        self,
        directory: TenantDirectory,
        store: TenantStore,
        backends: Sequence[Backend],
        calls: Sequence[OpenCalls],
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._store = store
        self._backends = tuple(backends)
        self._calls = tuple(calls)
        self._unix_time = unix_time
        self._pushes = SharePushes(directory, store, backends, unix_time)
        self._sweeps: dict[TenantId, int] = {}
        self._drains: dict[TenantId, float] = {}
        self._revision = 0
        self._note_changes()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        purge_at = 0.0
        while True:
            await self.look()
            if self._unix_time() >= purge_at:
                purge_at = self._unix_time() + _PURGE_INTERVAL_S
                await self._purge()
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def look(self) -> None:
        """Once. A store that cannot be read changes nothing of what runs."""
        with suppress(StoreUnavailable):
            self._note_changes()
        await self._pushes.push()
        for calls in self._calls:
            calls.end_those_not_served()
        for tenant in [name for name, end_s in self._drains.items() if end_s <= self._unix_time()]:
            del self._drains[tenant]
            self._sweeps[tenant] = _SWEEPS
        # All at once: another look may begin while this one waits for an engine.
        due = self._sweeps
        self._sweeps = {tenant: left - 1 for tenant, left in due.items() if left > 1}
        for tenant in due:
            await self.cancel_all(tenant)

    async def tiers(self) -> TierBytes:
        """What floors have to fit in: bytes of each tier of the engines that answer."""
        return await self._pushes.tiers()

    async def cancel_all(self, tenant: TenantId) -> None:
        """Cancel the tenant's unfinished generations in every engine that answers."""
        for backend in self._backends:
            # One that does not answer has lost them, or is looked at again.
            with suppress(KvClusterError):
                for record in await backend.list_generations(tenant):
                    if record.state in _UNFINISHED:
                        await backend.cancel(tenant, record.generation)

    def _note_changes(self) -> None:
        self._directory.refresh()
        changed = self._directory.tenants_since(self._revision)
        self._revision = self._directory.revision
        for tenant in changed:
            self._drains.pop(tenant.tenant, None)
            if tenant.state in (TenantState.SUSPENDED, TenantState.DELETED):
                self._sweeps[tenant.tenant] = _SWEEPS
            elif tenant.state is TenantState.DRAINING and tenant.drain_end_s is not None:
                self._drains[tenant.tenant] = tenant.drain_end_s
            else:
                self._sweeps.pop(tenant.tenant, None)

    async def _purge(self) -> None:
        act = Act(principal="router", method="PurgeTenant")
        try:
            purged = await asyncio.to_thread(self._store.purge, act)
        except StoreUnavailable as error:
            _log.warning("purge_put_off", error=type(error).__name__)
            return
        for tenant in purged:
            _log.info("tenant_purged", tenant=tenant)
