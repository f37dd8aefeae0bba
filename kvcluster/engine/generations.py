"""All generations that an engine knows: unfinished ones, and ended ones that can be replayed."""

import math
from collections import defaultdict

from kvcluster.engine.api import GenerationRecord
from kvcluster.engine.generation import Generation
from kvcluster.errors import GenerationNotFound
from kvcluster.types import GenerationId, TenantId


class Generations:
    """Finds generations by id and forgets ended ones: in time, and when they are too many, the
    oldest of the tenant that has most of them. So nobody's are forgotten because others end more.
    """

    def __init__(self, *, max_retained: int) -> None:
        self.active: dict[GenerationId, Generation] = {}
        self._retained: dict[GenerationId, Generation] = {}
        """First ended first, so also first to expire."""
        self._retained_of: defaultdict[TenantId, dict[GenerationId, Generation]] = defaultdict(dict)
        """The same by tenant."""
        self._max_retained = max_retained

    @property
    def num_retained(self) -> int:
        return len(self._retained)

    @property
    def num_known(self) -> int:
        return len(self.active) + len(self._retained)

    @property
    def next_expiry(self) -> float:
        return next((found.expires_at for found in self._retained.values()), math.inf)

    def find(self, generation_id: GenerationId) -> Generation:
        """Raises: GenerationNotFound."""
        found = self.active.get(generation_id) or self._retained.get(generation_id)
        if found is None:
            raise GenerationNotFound(
                f"no generation {generation_id!r}: it never was, or its events are no longer kept"
            )
        return found

    def knows(self, generation_id: GenerationId) -> bool:
        return generation_id in self.active or generation_id in self._retained

    def retain(self, generation: Generation) -> None:
        """Move an ended generation out of the active ones."""
        del self.active[generation.id]
        self._retained[generation.id] = generation
        self._retained_of[generation.tenant][generation.id] = generation
        if len(self._retained) > self._max_retained:
            most = max(self._retained_of.values(), key=len)
            self._forget(next(iter(most.values())))

    def forget(self, tenant: TenantId) -> None:
        """Forget the tenant's ended generations."""
        for generation in tuple(self._retained_of.get(tenant, {}).values()):
            self._forget(generation)

    def expire(self, now: float) -> None:
        """Forget the ended generations whose time is over."""
        while self.next_expiry <= now:
            self._forget(next(iter(self._retained.values())))

    def records(self, tenant: TenantId) -> tuple[GenerationRecord, ...]:
        """The tenant's generations, newest first."""
        mine = [generation for generation in self.active.values() if generation.tenant == tenant]
        mine += self._retained_of.get(tenant, {}).values()
        mine.sort(key=lambda generation: generation.request.arrival, reverse=True)
        return tuple(generation.record() for generation in mine)

    def tenants(self) -> set[TenantId]:
        """Those of which a generation is known."""
        return {each.tenant for each in self.active.values()} | set(self._retained_of)

    def _forget(self, generation: Generation) -> None:
        del self._retained[generation.id]
        own = self._retained_of[generation.tenant]
        del own[generation.id]
        if not own:
            del self._retained_of[generation.tenant]
