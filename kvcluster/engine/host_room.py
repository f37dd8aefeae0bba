"""Who leaves the host's memory when it is wanted: contexts are moved away one by one, whole, always
of the tenant that borrows most for its weight, the one first that was not used for longest. Engine
process.

What is in use does not leave, and no tenant falls below its floor for another one.
"""

from collections.abc import Awaitable, Callable, Sequence

from kvcluster.cache.tier import TierLedger
from kvcluster.engine.context import Context
from kvcluster.engine.contexts import Contexts
from kvcluster.types import TenantId


class HostRoom:
    """Of one engine. Moves nothing itself."""

    def __init__(
        self,
        ledger: TierLedger,
        contexts: Contexts,
        *,
        is_busy: Callable[[Context], bool],
        leave: Callable[[Context], Awaitable[None]],
        shrink: Callable[[TenantId], None],
    ) -> None:
        """`is_busy`: whether the copy of a context in the host's memory is being read or replaced.
        `leave` has a context there no more, or raises. `shrink`: have what is above a tenant's
        limit leave, later."""
        self._ledger = ledger
        self._contexts = contexts
        self._is_busy = is_busy
        self._leave = leave
        self._shrink = shrink
        self._plugged: set[TenantId] = set()

    async def make(self, tenant: TenantId, num_bytes: int) -> bool:
        """Have so many bytes free for the tenant, if that can be: False, and nobody has to leave,
        where its share does not allow it. Raises: SpillError."""
        if tenant not in self._plugged:
            self._plugged.add(tenant)
            self._ledger.plug(tenant, _Resting(self, tenant, self._shrink))
        if not self._ledger.has_room(tenant, (num_bytes,)):
            return False
        while self._ledger.available_in(tenant, 0) < num_bytes:
            leaving = self._next(tenant, num_bytes)
            if leaving is None:
                return False
            await self._leave(leaving)
        return True

    async def keep_limit(self, tenant: TenantId) -> None:
        """Move away what a tenant has above its limit. Raises: SpillError."""
        while self._is_above_limit(tenant, 0) and (resting := self.resting(tenant)):
            await self._leave(resting[0])

    def resting(self, tenant: TenantId) -> Sequence[Context]:
        """The tenant's contexts there that nobody is using, least recently used first."""
        there = [
            context
            for context in self._contexts.of(tenant)
            if context.host.spill is not None and not self._is_busy(context)
        ]
        return sorted(there, key=lambda context: context.last_access_time_s)

    def _next(self, tenant: TenantId, num_bytes: int) -> Context | None:
        """Who leaves next so that the tenant can take so much."""
        names = self._ledger.tenants
        if self._is_above_limit(tenant, num_bytes):
            names = (tenant,)
        for name in sorted(names, key=lambda name: self._order(name, tenant, num_bytes)):
            borrowed = self._ledger.borrowed(name)[0]
            for context in self.resting(name):
                assert context.host.spill is not None
                if name == tenant or context.host.spill.num_bytes <= borrowed:
                    return context
        return None

    def _order(
        self, name: TenantId, tenant: TenantId, num_bytes: int
    ) -> tuple[float, bool, TenantId]:
        """As `TierLedger.reclaim` has it: the highest level first, counting what is wanted."""
        more = max(0, num_bytes - self._ledger.floor_left(name)[0]) if name == tenant else 0
        level = (self._ledger.borrowed(name)[0] + more) / self._ledger.share(name).weight
        return -level, name != tenant, name

    def _is_above_limit(self, tenant: TenantId, more: int) -> bool:
        return self._ledger.used(tenant)[0] + more > self._ledger.share(tenant).limit_bytes


class _Resting:
    """`tier.Reclaimable`: what a tenant could do without, as its ledger sees it."""

    def __init__(
        self, room: HostRoom, tenant: TenantId, shrink: Callable[[TenantId], None]
    ) -> None:
        self._room = room
        self._tenant = tenant
        self._shrink = shrink

    def idle_units(self) -> Sequence[int]:
        resting = self._room.resting(self._tenant)
        return (sum(each.host.spill.num_bytes for each in resting if each.host.spill),)

    def evict(self, group: int, count: int) -> None:
        """Nothing comes free at once: files are moved first, whole contexts of them."""
        del group, count
        self._shrink(self._tenant)
