"""A cluster whose steps take time: seconds are a function of a step's work, and the clock moves
from one event to the next. So hours of load run in seconds, and the same every time.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from kvcluster.engine.api import CacheMode, Output
from kvcluster.engine.plan import StepPlan
from kvcluster.engine.step_cost import CostModel
from kvcluster.tenancy.limits import NO_LIMITS
from kvcluster.types import GenerationId, TenantId
from tests.fake_engine import FakeCluster, packed, request


@dataclass
class Sent:
    """A request and when its first token came."""

    tenant: TenantId
    at: float
    first_token_at: float | None = None
    begun_at: float | None = None
    """When the first step that has some of it began."""

    @property
    def others_s(self) -> float:
        """How long the steps of others kept it waiting."""
        assert self.begun_at is not None, "it has begun"
        return self.begun_at - self.at

    @property
    def wait_s(self) -> float:
        assert self.first_token_at is not None, "it has its first token"
        return self.first_token_at - self.at


@dataclass
class SimulatedTime:
    """Runs `fake` with so many seconds a step and a unit of work."""

    fake: FakeCluster
    step_s: float
    work_per_s: float
    sent: dict[GenerationId, Sent] = field(default_factory=dict)
    served: dict[TenantId, float] = field(default_factory=dict)
    """Work done, by tenant."""
    largest_step_s: float = 0.0
    """Of steps for tenants of `flooding` alone: they have no head start."""
    flooding: set[TenantId] = field(default_factory=set)
    """Tenants that always have something to be done."""
    _planned: list[tuple[float, StepPlan]] = field(default_factory=list)
    """When each step in flight is done."""
    _arrivals: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)
    _owners: dict[int, TenantId] = field(default_factory=dict)
    _waiting: set[GenerationId] = field(default_factory=set)
    """Without a token."""
    _num_arrivals: int = 0

    @property
    def now(self) -> float:
        return self.fake.clock.now

    def at(self, seconds: float, act: Callable[[], object]) -> None:
        """Call `act` at this time."""
        self._num_arrivals += 1
        heapq.heappush(self._arrivals, (seconds, self._num_arrivals, act))

    def send(
        self,
        tenant: TenantId,
        num_tokens: int,
        *,
        max_output_tokens: int = 1,
        weight: int = 1,
        priority: int = 0,
    ) -> GenerationId:
        """A request whose prompt is there at once."""
        generation = self.fake.engine.submit(
            request(
                max_output_tokens,
                tenant=tenant,
                input_tokens=num_tokens,
                priority=priority,
                # What is found in a cache takes no time.
                cache_mode=CacheMode.BYPASS,
                limits=msgspec.structs.replace(NO_LIMITS, weight=weight),
                disconnect_grace_s=3600.0,
            )
        )
        self.fake.engine.append_prompt(generation, packed([1] * num_tokens))
        self.fake.engine.finish_prompt(generation)
        self.sent[generation] = Sent(tenant, self.now)
        self._waiting.add(generation)
        return generation

    def run_until(self, seconds: float) -> None:
        while True:
            self._plan()
            done_at = self._planned[0][0] if self._planned else seconds
            arrives_at = self._arrivals[0][0] if self._arrivals else seconds
            # A step that is to be planned later.
            plans_at = self.fake.engine.next_wakeup()
            if plans_at <= self.now or not self._has_room:
                plans_at = seconds
            next_at = min(done_at, arrives_at, plans_at, seconds)
            self.fake.clock.now = max(self.now, next_at)
            if self._arrivals and arrives_at <= next_at:
                heapq.heappop(self._arrivals)[2]()
            elif self._planned and done_at <= next_at:
                self._answer()
            elif next_at >= seconds:
                return

    def waits(self, tenant: TenantId) -> list[float]:
        """Seconds to the first token of the tenant's requests that have it, shortest first."""
        found = [sent for sent in self.sent.values() if sent.tenant == tenant]
        return sorted(sent.wait_s for sent in found if sent.first_token_at is not None)

    def _plan(self) -> None:
        while self._has_room:
            self._note_owners()
            plan = self.fake.plan()
            if plan is None:
                return
            self._note_owners()
            after = max(self.now, self._planned[-1][0] if self._planned else 0.0)
            self._note_begun(plan, after)
            self._planned.append((after + self._seconds(plan), plan))

    @property
    def _has_room(self) -> bool:
        """For one more step in flight."""
        return len(self.fake.answers) < self.fake.config.lookahead_steps

    def _note_owners(self) -> None:
        for running in self.fake.engine._scheduler.running:
            if running.sequence is not None:
                self._owners[running.sequence] = running.spec.tenant

    def _note_begun(self, plan: StepPlan, at: float) -> None:
        sequences = {part.sequence for part in plan.sequences}
        for running in self.fake.engine._scheduler.running:
            sent = self.sent.get(running.generation)
            if sent is not None and sent.begun_at is None and running.sequence in sequences:
                sent.begun_at = at

    def _seconds(self, plan: StepPlan) -> float:
        cost, total = CostModel(self.fake.spec), 0.0
        for part in plan.sequences:
            # One row a decode: as much as it computes, for a fake.
            work = cost.prefill(part.start, part.num_tokens).total
            total += work
            tenant = self._owners[part.sequence]
            self.served[tenant] = self.served.get(tenant, 0.0) + work
        seconds = self.step_s + total / self.work_per_s
        if {self._owners[part.sequence] for part in plan.sequences} <= self.flooding:
            self.largest_step_s = max(self.largest_step_s, seconds)
        return seconds

    def _answer(self) -> None:
        self._planned.pop(0)
        self.fake.answer()
        self.fake.engine.tick()
        for generation in tuple(self._waiting):
            if self._has_token(generation):
                self.sent[generation].first_token_at = self.now
                self._waiting.remove(generation)

    def _has_token(self, generation: GenerationId) -> bool:
        return any(isinstance(event, Output) for event in self.fake.events(generation))
