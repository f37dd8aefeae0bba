"""Engines with one fault each, which the attack on it has to find."""

import asyncio
import time
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator

import msgspec

from kvcluster.engine.api import (
    Admitted,
    GenerationEvent,
    GenerationRecord,
    GenerationRequest,
    Opened,
    Progress,
)
from kvcluster.types import GenerationId, TenantId
from tests.unit.router.fake_backend import FakeBackend, FakeGeneration


def spin(seconds: float) -> None:
    """A sleep of so little would take longer."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class ForgetsTenants(FakeBackend):
    """Finds a generation by its id alone."""

    def _find(self, tenant: TenantId, name: GenerationId) -> FakeGeneration:
        found = self.generations.get(name)
        return found if found is not None else super()._find(tenant, name)


class SharesRequestIds(FakeBackend):
    """Idempotency keys of all tenants in one table."""

    async def open(self, request: GenerationRequest) -> Opened:
        if not request.request_id:
            return await super().open(request)
        for name, generation in self.generations.items():
            if generation.request.request_id == request.request_id:
                generation.uploads[len(generation.uploads)] = True
                generation.record = msgspec.structs.replace(
                    generation.record, tenant=request.tenant
                )
                return Opened(generation=name, upload=len(generation.uploads) - 1)
        return await super().open(request)


class TakesAnyLength(FakeBackend):
    """Looks at the prompt when it is there."""

    async def open(self, request: GenerationRequest) -> Opened:
        return await super().open(
            msgspec.structs.replace(request, input_tokens=None, max_output_tokens=1)
        )


class CountsEverybody(FakeBackend):
    """The place in the queue counts all tenants' requests."""

    async def open(self, request: GenerationRequest) -> Opened:
        position = sum(one.finished is None for one in self.generations.values())
        opened = await super().open(request)
        generation = self.generations[opened.generation]
        first = generation.events[0]
        assert isinstance(first.event, Admitted)
        event = msgspec.structs.replace(first.event, queue_position=position)
        generation.events[0] = msgspec.structs.replace(first, event=event)
        return opened


class TellsByTime(FakeBackend):
    """Looks a little longer where another tenant has the generation."""

    delay_s = 0.001

    async def get(self, tenant: TenantId, name: GenerationId) -> GenerationRecord:
        if name in self.generations and self.generations[name].record.tenant != tenant:
            spin(self.delay_s)
        return await super().get(tenant, name)


class Caches(FakeBackend):
    """With a prefix cache of whole prompts, least recently used first, by tenant: prompts that are
    in it are computed at once, others take `compute_s`."""

    compute_s = 0.02

    def __init__(
        self, *, is_shared: bool = False, capacity: int = 10_000, says_cached: bool = True
    ) -> None:
        """`is_shared`: all tenants have one. `says_cached`: in the events."""
        super().__init__()
        self._is_shared = is_shared
        self._capacity = capacity
        self._says_cached = says_cached
        self._cached: dict[TenantId, OrderedDict[bytes, None]] = {}
        self._was_hit: set[GenerationId] = set()

    def _cache_of(self, tenant: TenantId) -> OrderedDict[bytes, None]:
        return self._cached.setdefault(TenantId("") if self._is_shared else tenant, OrderedDict())

    def _name_of(self, ids: "array[int]") -> bytes:
        return ids.tobytes()

    async def _compute(self) -> None:
        await asyncio.sleep(self.compute_s)

    async def finish_prompt(self, name: GenerationId, upload: int) -> None:
        generation = self.generations[name]
        cache = self._cache_of(generation.request.tenant)
        prompt = self._name_of(generation.ids)
        if prompt in cache:
            self._was_hit.add(name)
            cache.move_to_end(prompt)
        else:
            await self._compute()
            cache[prompt] = None
            while len(cache) > self._capacity:
                cache.popitem(last=False)
        await super().finish_prompt(name, upload)

    async def watch(
        self, tenant: TenantId, name: GenerationId, after_sequence: int
    ) -> AsyncIterator[tuple[GenerationEvent, ...]]:
        async for batch in super().watch(tenant, name, after_sequence):
            is_said = self._says_cached and name in self._was_hit
            yield tuple(map(_with_hit, batch)) if is_said else batch


class CachesByContents(Caches):
    """What a prompt is found by leaves out the order of its tokens."""

    compute_s = 0.0

    def _name_of(self, ids: "array[int]") -> bytes:
        return bytes(sorted(ids))


class CachesEvenly(Caches):
    """Takes the same time for each prompt that is not cached: a timer's would differ by more than
    the leaks that are looked for."""

    compute_s = 300e-6

    async def _compute(self) -> None:
        spin(self.compute_s)


class CachesAndTells(CachesEvenly):
    """Each tenant's hits are its own, but a prompt that another tenant has cached takes a little
    longer."""

    delay_s = 20e-6

    async def finish_prompt(self, name: GenerationId, upload: int) -> None:
        generation = self.generations[name]
        prompt, own = generation.ids.tobytes(), generation.request.tenant
        if any(prompt in cache for tenant, cache in self._cached.items() if tenant != own):
            spin(self.delay_s)
        await super().finish_prompt(name, upload)


def _with_hit(event: GenerationEvent) -> GenerationEvent:
    if not isinstance(event.event, Progress):
        return event
    return msgspec.structs.replace(
        event, event=msgspec.structs.replace(event.event, cached_tokens=8)
    )
