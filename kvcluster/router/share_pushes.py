"""Tells every engine the tenants' shares of cache memory: at each change, and now and then anew for
an engine that was started since.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvcluster.engine.api import Backend, BackendStatus
from kvcluster.errors import StoreUnavailable
from kvcluster.tenancy.directory import TenantDirectory
from kvcluster.tenancy.limits import Tier
from kvcluster.tenancy.shares import TenantShares, TierBytes, shares_of
from kvcluster.tenancy.store import TenantStore
from kvcluster.tenancy.tenant import Tenant
from kvcluster.types import TenantId

_REPEAT_S = 2.0
_TIMEOUT_S = 5.0


class SharePushes:
    """Of one router."""

    def __init__(
        self,
        directory: TenantDirectory,
        store: TenantStore,
        backends: Sequence[Backend],
        unix_time: Callable[[], float],
    ) -> None:
        """`store`: where the tenants' data keys are, which go with the shares."""
        self._directory = directory
        self._store = store
        self._backends = tuple(backends)
        self._unix_time = unix_time
        self._revisions = [-1] * len(backends)
        self._repeat_at = 0.0

    async def push(self) -> None:
        """Send what an engine may not have yet. One that does not answer is asked the next time."""
        if self._unix_time() >= self._repeat_at:
            self._repeat_at = self._unix_time() + _REPEAT_S
            self._revisions = [-1] * len(self._backends)
        revision = self._directory.revision
        if min(self._revisions, default=revision) == revision:
            return
        tenants = self._directory.tenants_since(-1)
        shares = shares_of(
            tenants,
            revision=revision,
            num_engines=len(self._backends),
            data_keys=await asyncio.to_thread(self._data_keys, tenants),
        )
        answers = await asyncio.gather(
            *(_apply(backend, shares) for backend in self._backends), return_exceptions=True
        )
        for index, answer in enumerate(answers):
            if answer is None:
                self._revisions[index] = revision

    async def tiers(self) -> TierBytes:
        """Of the engines that answer."""
        answers = await asyncio.gather(*map(_status, self._backends), return_exceptions=True)
        found = [answer.tier_bytes for answer in answers if isinstance(answer, BackendStatus)]
        if not any(found):
            return {}
        return {tier: sum(tiers.get(tier.value, 0) for tiers in found) for tier in Tier}

    def _data_keys(self, tenants: Sequence[Tenant]) -> dict[TenantId, dict[int, bytes]]:
        """Of those whose keys can be read now."""
        found = {}
        for tenant in tenants:
            with suppress(StoreUnavailable):
                found[tenant.tenant] = self._store.data_keys(tenant.tenant)
        return found


async def _apply(backend: Backend, shares: TenantShares) -> None:
    async with asyncio.timeout(_TIMEOUT_S):
        await backend.apply_shares(shares)


async def _status(backend: Backend) -> BackendStatus:
    async with asyncio.timeout(_TIMEOUT_S):
        return await backend.status()
