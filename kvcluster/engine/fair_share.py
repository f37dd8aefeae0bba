"""Whose turn it is: weighted fair shares of the engine's work between tenants.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): each tenant has a virtual time, the work done
for it divided by its weight, and the least is served next. So over any time in which two tenants
have work to be done, what each gets for its weight differs by no more than one part of a step and
the head start below, whatever either sends.

A tenant that asked for less than its share may run ahead by a head start (borrowed virtual time,
Duda and Cheriton, 1999): its short requests are served at once instead of at half speed. It has no
other claim on the past.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from kvcluster.types import TenantId

_RECENT_S = 60.0
"""A tenant that sent something so long ago may well send something now."""


@dataclass(slots=True)
class _Account:
    """Mutable."""

    time: float
    weight: int = 1
    seen_at: float = -math.inf


class FairShares:
    """Virtual times of the tenants that this engine has served. Work is in any one unit."""

    def __init__(self, *, head_start: float) -> None:
        """`head_start`: most work by which a tenant that was idle may run ahead."""
        self._head_start = head_start
        self._now = 0.0
        self._accounts: dict[TenantId, _Account] = {}

    def note(self, tenant: TenantId, weight: int, now: float) -> None:
        """The tenant has sent a request, at `now` in seconds, and has this weight from here on."""
        account = self._account(tenant)
        account.weight = weight
        account.seen_at = now

    def recent(self, now: float) -> set[TenantId]:
        """Tenants that may send something any moment: they have not long ago."""
        accounts = self._accounts.items()
        return {tenant for tenant, account in accounts if now - account.seen_at < _RECENT_S}

    def next(self, tenants: Collection[TenantId]) -> TenantId:
        """Which of these, who all have something to be done, is served next."""
        times = {tenant: self.time(tenant) for tenant in tenants}
        first = min(times, key=lambda tenant: (times[tenant], tenant))
        self._account(first).time = times[first]
        self._now = max(self._now, times[first])
        return first

    def charge(self, tenant: TenantId, work: float) -> None:
        """So much is done for the tenant; less than nothing: so much too much was charged."""
        account = self._account(tenant)
        account.time = self.time(tenant) + work / account.weight

    def time(self, tenant: TenantId) -> float:
        """The tenant's virtual time, if it began something now."""
        account = self._account(tenant)
        return max(account.time, self._now - self._head_start / account.weight)

    def lead(self, tenant: TenantId) -> float:
        """Work that the tenant may still have before it is no longer ahead of its share."""
        return max(0.0, self._now - self.time(tenant)) * self.weight(tenant)

    def weight(self, tenant: TenantId) -> int:
        return self._account(tenant).weight

    def forget_unseen(self, active: Collection[TenantId], now: float) -> None:
        """Forget tenants that have no work and have sent nothing for long: their past is no claim.
        One that ran ahead is kept until the others have caught up."""
        for tenant in set(self._accounts) - self.recent(now) - set(active):
            if self._accounts[tenant].time <= self._now:
                del self._accounts[tenant]

    def _account(self, tenant: TenantId) -> _Account:
        if tenant not in self._accounts:
            self._accounts[tenant] = _Account(self._now - self._head_start)
        return self._accounts[tenant]
