"""Who may start in one plan: how many generations a tenant runs, and what room it leaves others."""

import math
from collections import Counter
from collections.abc import Collection, Iterable

from kvcluster.engine.request import Request, RequestState
from kvcluster.types import TenantId


class Turns:
    """Whose turn it may be in one plan: no tenant runs more generations than it may, or takes the
    last place of one that runs none. Mutable."""

    def __init__(
        self, running: Iterable[Request], *, max_running: int, tenants: Collection[TenantId] = ()
    ) -> None:
        """`tenants`: those that have requests, or may have some any moment."""
        self._running = Counter(request.spec.tenant for request in running)
        self._max_running = max_running
        self._tenants = set(tenants)
        self._short: set[TenantId] = set()
        self._first_to_finish = math.inf

    def are_left(self, request: Request) -> bool:
        """Whether its tenant may run one more."""
        spec = request.spec
        return self._running[spec.tenant] < spec.limits.concurrent_generations

    def has_place(self, tenant: TenantId) -> bool:
        """Whether one more of the tenant's may run. The last places, at most half of them, are for
        tenants that run nothing."""
        kept = 0
        if self._running[tenant]:
            kept = sum(not self._running[other] for other in self._tenants - {tenant})
        kept = min(kept, self._max_running // 2)
        return self._running.total() + kept < self._max_running

    def take(self, request: Request) -> None:
        self._running[request.spec.tenant] += 1

    def note_short(self, request: Request) -> None:
        """It got no block, in this plan or the one before: what comes free is its tenant's, as long
        as it runs."""
        if request.state is RequestState.RUNNING:
            self._short.add(request.spec.tenant)

    def note_blocked(self, finish: float) -> None:
        """A request that would finish at this virtual time waits for memory."""
        self._first_to_finish = min(self._first_to_finish, finish)

    def is_short(self, tenant: TenantId) -> bool:
        return tenant in self._short

    def may_borrow(self, finish: float) -> bool:
        """Whether a request that would finish at this virtual time may start in memory that its
        tenant's floor does not cover. Not ahead of one that waits for memory and would finish
        sooner: small requests without end would keep a large one waiting for ever."""
        return not self._short and finish <= self._first_to_finish
