"""Whose blocks a running request gets that found none: who was served first is preempted last, and
floors are kept.

Within a tenant the order is that of its requests: priority, then arrival. Between tenants priority
says nothing: a tenant's requests take each other's places, and the places are those of arrival. So
one order holds at any time, its first request always gets on, and nothing can livelock.
"""

from collections.abc import Sequence
from operator import attrgetter

from kvcluster.cache.partitions import CachePartitions
from kvcluster.engine.request import Request
from kvcluster.types import GenerationId, TenantId


def victim(
    request: Request, running: Sequence[Request], partitions: CachePartitions
) -> Request | None:
    """The request that leaves to make room for `request`; None: it waits.

    It is one that comes after it: its own tenant's, or that of a tenant that has borrowed memory.
    For memory that its floor promises, any that has borrowed. The tenant that borrows most for its
    weight gives first, and gives its last request.
    """
    places = _places(running)
    partition = partitions.of(request.spec.tenant)
    is_at_limit, is_owed = partition.is_at_limit(), partition.is_owed()

    def may_leave(other: Request) -> bool:
        is_after = places[other.generation] > places[request.generation]
        if other.spec.tenant == request.spec.tenant:
            return is_after
        return not is_at_limit and (is_after or is_owed) and _borrows(other, partitions)

    candidates = [other for other in running if other is not request and may_leave(other)]
    if not candidates:
        return None
    return max(
        candidates,
        key=lambda other: (
            partitions.of(other.spec.tenant).level(),
            other.spec.tenant,
            places[other.generation],
        ),
    )


def is_hopeless(request: Request, running: Sequence[Request], partitions: CachePartitions) -> bool:
    """Whether no running request, by leaving or by ending, could make room for this one."""
    is_at_limit = partitions.of(request.spec.tenant).is_at_limit()
    return not any(
        other.spec.tenant == request.spec.tenant
        or (not is_at_limit and _borrows(other, partitions))
        for other in running
        if other is not request
    )


def _borrows(request: Request, partitions: CachePartitions) -> bool:
    return any(partitions.of(request.spec.tenant).borrowed())


def _places(running: Sequence[Request]) -> dict[GenerationId, int]:
    """Each tenant's arrivals, dealt to its requests in their order."""
    by_tenant: dict[TenantId, list[Request]] = {}
    for request in running:
        by_tenant.setdefault(request.spec.tenant, []).append(request)
    places: dict[GenerationId, int] = {}
    for requests in by_tenant.values():
        arrivals = sorted(request.arrival for request in requests)
        in_order = sorted(requests, key=attrgetter("order"))
        for request, arrival in zip(in_order, arrivals, strict=True):
            places[request.generation] = arrival
    return places
