"""What the next step computes: continuous batching over one ring group's blocks.

Tenants take turns by `fair_share`. A tenant's requests that decode come first, one token each, then
prefill chunks in order of priority, then arrival. A tenant that is alone fills the step: all that
decode, and chunks up to `prefill_chunk_tokens`. Where others may come, a step's time is bounded
too, and so is their wait for the next one: `newcomers`. Who has to leave when blocks run out:
`preemption`.

Blocks of a sequence that leaves are free for the plan after the one that tells the ranks so.
"""

import bisect
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from kvcluster.cache.block_table import BlockTable, TableEntry
from kvcluster.cache.partitions import CachePartitions
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.draft import Draft, PlannedStep, RouteChoice, Schedule
from kvcluster.engine.fair_share import FairShares
from kvcluster.engine.lanes import Lane, StepBudget, lanes_of
from kvcluster.engine.newcomers import NewcomerWait
from kvcluster.engine.plan import NewBlock, Release, SequenceStep, StepPlan
from kvcluster.engine.preemption import is_hopeless, victim
from kvcluster.engine.prefixes import Prefixes
from kvcluster.engine.releases import BlockReleases
from kvcluster.engine.request import Request, RequestState
from kvcluster.engine.sequence_blocks import SequenceBlocks
from kvcluster.engine.step_cost import CostModel, Pace
from kvcluster.engine.turns import Turns
from kvcluster.engine.zeroing import Zeroing
from kvcluster.types import ModelSpec, Route, SequenceId, TenantId

_MAX_SCORED_LOGITS = 1 << 26
"""Of the rows of a step that score their prompt: 256 MiB of float32."""

_by_order = attrgetter("order")


class _Leaving(NamedTuple):
    """A sequence that the ranks are told to forget with the next plan."""

    sequence: SequenceId
    tenant: TenantId
    tables: tuple[BlockTable, ...]


class Scheduler:
    """Owns the queues and, through the partitions, every block. Requests are moved in place."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        cache: CacheConfig,
        engine: EngineConfig,
        partitions: CachePartitions,
        choose_route: RouteChoice,
    ) -> None:
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        """Both in order: the first is served first."""
        self._spec = spec
        self._block_size = cache.block_size
        self._scored_tokens = max(_MAX_SCORED_LOGITS // spec.vocab_size, cache.block_size)
        self._config = engine
        self._partitions = partitions
        self._choose_route = choose_route
        self._num_sequences = 0
        self.prefixes = Prefixes(spec, cache=cache, partitions=partitions)
        self.zeroing = Zeroing(partitions)
        self._blocks = SequenceBlocks(spec, cache=cache, engine=engine, partitions=partitions)
        self._releases = BlockReleases(partitions, spec.windows, block_size=cache.block_size)
        self._leaving: list[_Leaving] = []
        self._released: list[Release] = []
        self._cost = CostModel(spec)
        self._pace = Pace()
        self._wait = NewcomerWait(engine, block_size=cache.block_size)
        self._shares = FairShares(head_start=engine.tenant_head_start_s)
        self._short: list[Request] = []
        """Those that found no block in the last plan: what has come free since is theirs."""

    def add(self, request: Request, *, now: float) -> None:
        """Queue a request, which came at `now`. Its prompt may still be on the way."""
        spec = request.spec
        self._shares.forget_unseen({each.spec.tenant for each in self._all()}, now)
        self._shares.note(spec.tenant, spec.limits.weight, now)
        self._queue(request)

    def forget_tenants(self) -> None:
        """Nobody has been served yet, and nobody was seen: what proves that the ring works is no
        tenant. What was learnt of its speed stays."""
        self._shares = FairShares(head_start=self._config.tenant_head_start_s)

    def observe(self, planned: PlannedStep, seconds: float) -> None:
        """Learn how long a step took. Its tenants are charged for that, in proportion to what was
        thought of before: no guess is held against anyone."""
        self._pace.observe(planned.work, seconds)
        guessed = sum(planned.charges.values())
        for tenant, charged in planned.charges.items():
            if guessed > 0:
                self._shares.charge(tenant, seconds * charged / guessed - charged)

    def end(self, request: Request) -> None:
        """Take a request out. Its blocks come free with the next plan, or are kept."""
        if request.state is RequestState.RUNNING:
            self.prefixes.keep(request)
            self.running.remove(request)
            self._leave(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        request.end()

    def reset(self) -> None:
        """Forget every sequence at once, when the ranks have lost theirs: nothing is in flight."""
        for request in self.running:
            self._leave(request)
            request.preempt()
            self._queue(request)
        self.running.clear()
        self.prefixes.clear()
        self._free_leaving()
        self.zeroing.reset()
        self._released.clear()

    def plan(self, *, epoch: int, step: int, is_idle: bool, now: float) -> Schedule:
        """Choose the next step and account for it as if it had run.

        `is_idle`: no step is in flight, so that releases have no later plan to ride on. `now`: in
        seconds, on any clock.
        """
        lanes = lanes_of(self.running, self.waiting, self._block_size)
        tenants = self._tenants(now)
        turns = Turns(self.running, max_running=self._config.max_running, tenants=tenants)
        while self._short:
            turns.note_short(self._short.pop())
        budget = self._wait.budget(lanes.values(), self._pace, is_shared=len(tenants) > 1)
        draft = Draft(budget, turns)
        while lanes:
            tenant = self._shares.next(lanes)
            lane = lanes[tenant]
            self._serve(draft, lane, lane.pop())
            if not lane:
                del lanes[tenant]
        return self._seal(draft, epoch=epoch, step=step, is_idle=is_idle)

    def plan_from(self, done_at: float, now: float) -> float:
        """When the next step should be planned, if all that is in flight is expected to be done at
        `done_at`. At once where no tenant may come that is not here."""
        return self._wait.plan_from(done_at) if len(self._tenants(now)) > 1 else now

    def _tenants(self, now: float) -> set[TenantId]:
        """Those that have requests, or may have some any moment."""
        return {each.spec.tenant for each in self._all()} | self._shares.recent(now)

    def _serve(self, draft: Draft, lane: Lane, request: Request) -> None:
        budget = draft.budget
        if request.can_decode:
            if not budget.is_spent or not draft.parts:
                self._extend(draft, request, request.num_planned + 1)
            return
        if budget.prompt_tokens < 1:
            lane.prompts.clear()
        elif request.state is RequestState.RUNNING:
            budget.spend_prompt(self._prefill(draft, request))
        elif self._may_start(draft, request):
            # No overtaking within a tenant: a large request would wait for ever behind small ones.
            # But a tenant whose own requests fill its limit holds nobody else up.
            used = self._admit(draft, request)
            budget.spend_prompt(used)
            if used:
                draft.turns.take(request)
            else:
                lane.drop_waiting()

    def _may_start(self, draft: Draft, request: Request) -> bool:
        if request.state is not RequestState.WAITING or not draft.turns.are_left(request):
            return False
        # While all that came of its prompt is there already, there is nothing to compute.
        return request.prefill_end(self._block_size) > self.prefixes.known_tokens(request)

    def _prefill(self, draft: Draft, request: Request) -> int:
        end = self._chunk_end(request, draft.budget)
        return self._extend(draft, request, end) if end > request.num_planned else 0

    def _chunk_end(self, request: Request, budget: StepBudget) -> int:
        end = request.prefill_end(self._block_size)
        region = self._blocks.partition(request).exact_region(request.policy.storage)
        end = region.chunk_end(request.num_planned, end, self._block_size)
        history, lead_s = self._num_held(request), self._shares.lead(request.spec.tenant)
        tokens = budget.tokens_after(
            history,
            self._cost,
            self._pace,
            block_size=self._block_size,
            head_start_s=min(lead_s, self._wait.longest_head_start_s),
        )
        if request.spec.sampling.prompt_logprobs is not None:
            tokens = min(tokens, self._scored_tokens)
        if request.survivors is not None:
            end = request.survivors.chunk_end(request.num_planned, end)
        if request.num_planned < request.checkpoint:
            end = min(end, request.checkpoint)
        within = request.num_planned + tokens
        if end > within:
            end = within // self._block_size * self._block_size
        return end

    def _extend(self, draft: Draft, request: Request, end: int) -> int:
        """Plan a running request up to `end`, or as far as its blocks go; returns its tokens."""
        start = request.num_planned
        covered, appended = self._blocks.cover(request, end)
        if covered <= start:
            self._make_room(draft, request)
            return 0
        self._add_step(draft, request, covered, appended)
        return covered - start

    def _make_room(self, draft: Draft, request: Request) -> None:
        draft.turns.note_short(request)
        self._short.append(request)
        if self._leaving:
            return
        leaving = victim(request, self.running, self._partitions)
        if leaving is not None:
            self.preempt(leaving)
        elif is_hopeless(request, self.running, self._partitions):
            draft.refused.append(request)
        # Otherwise it waits for the others: they finish, or preempt it.

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks, or keep them; it begins again from the known tokens."""
        self.prefixes.keep(request)
        self.running.remove(request)
        self._leave(request)
        request.preempt()
        self._queue(request)

    def _admit(self, draft: Draft, request: Request) -> int:
        tenant, turns = request.spec.tenant, draft.turns
        if request.num_steps_in_flight or turns.is_short(tenant) or not turns.has_place(tenant):
            return 0
        with self.prefixes.present(request) as present:
            cost = self._cost_of(request, len(present) * self._block_size)
            finish = self._shares.time(tenant) + cost / self._shares.weight(tenant)
            saved = self.prefixes.num_exact(present, request.policy)
            if self.running and not self._blocks.has_room(request, len(self.running), saved):
                if self._blocks.is_below_limit(request, saved):
                    turns.note_blocked(finish)
                if not self._blocks.could_fit(request):
                    draft.refused.append(request)
                return 0
            if not turns.may_borrow(finish) and not self._blocks.is_in_floor(request, saved):
                return 0
            return self._start(draft, request, present)

    def _cost_of(self, request: Request, num_present: int) -> float:
        num_tokens = max(request.known_length, len(request.tokens))
        return self._pace.seconds(self._cost.prefill(num_present, max(1, num_tokens - num_present)))

    def _start(self, draft: Draft, request: Request, present: list[TableEntry]) -> int:
        self._blocks.open(request)
        adopted = self.prefixes.adopt(request, present) or ()
        start = request.num_planned
        end = self._chunk_end(request, draft.budget)
        covered, appended = self._blocks.cover(request, end)
        if covered <= start:
            self._blocks.release(request.spec.tenant, request.tables)
            request.let_go()
            request.num_planned = request.num_cached = 0
            if end and not self.running and not self._leaving:
                draft.refused.append(request)
            return 0
        self._num_sequences += 1
        sequence = SequenceId(self._num_sequences)
        request.start(sequence)
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=_by_order)
        draft.started.append(self.prefixes.told_at_start(request, adopted))
        self._released += self.prefixes.released_at_start(request)
        self._add_step(draft, request, covered, appended)
        return covered - start

    def _add_step(
        self, draft: Draft, request: Request, end: int, appended: Sequence[NewBlock]
    ) -> None:
        start = request.num_planned
        is_decode, survivors = request.has_sampled, request.survivors
        is_last = request.is_prompt_complete and end == len(request.tokens)
        samples = is_decode or (is_last and not request.builds_context)
        scoring = request.scoring(end)
        assert request.sequence is not None, "a running request has a sequence"
        draft.parts.append(
            SequenceStep(
                sequence=request.sequence,
                start=start,
                num_tokens=end - start,
                token_ids=b"" if is_decode else request.packed_ids(start, end),
                appended=tuple(appended),
                num_prompt_tokens=request.num_prompt_tokens,
                samples=samples,
                route=Route.PASS_Q if is_decode else self._route(request, end - start),
                survivors=(
                    survivors.tell() if survivors is not None and survivors.ends_epoch(end) else ()
                ),
                scoring=scoring,
            )
        )
        draft.requests.append(request)
        self._charge(draft, request, end)
        if scoring is not None:
            request.num_scored = scoring.below
        request.num_planned = end
        request.num_steps_in_flight += 1
        if samples:
            request.has_sampled = True
            request.num_pending += 1

    def _charge(self, draft: Draft, request: Request, end: int) -> None:
        held = self._num_held(request)
        if request.has_sampled:
            work = self._cost.decode(held)
        else:
            work = self._cost.prefill(held, end - request.num_planned)
        draft.work = draft.work.plus(work)
        draft.budget.spend(work, self._pace)
        tenant, seconds = request.spec.tenant, self._pace.seconds(work)
        draft.charges[tenant] = draft.charges.get(tenant, 0.0) + seconds
        self._shares.charge(tenant, seconds)

    def _num_held(self, request: Request) -> int:
        """Tokens of history that the request's next rows attend to."""
        held, table = request.num_planned, request.table
        if request.survivors is not None:
            return request.survivors.num_held(held)
        if table is not None and table.recent_blocks is not None:
            return min(held, (table.recent_blocks + 1) * self._block_size)
        return held

    def _route(self, request: Request, num_new_tokens: int) -> Route:
        if self._config.history_route != "auto":
            return Route(self._config.history_route)
        return self._choose_route(
            self._spec.layers,
            num_new_tokens=num_new_tokens,
            num_history_tokens=self._num_held(request),
            num_ranks=self._partitions.num_ranks,
            element_bytes=self._spec.bytes_per_element,
            stored_share=self._blocks.partition(request).stored_share(request.policy.storage),
        )

    def _seal(self, draft: Draft, *, epoch: int, step: int, is_idle: bool) -> Schedule:
        refused = tuple(draft.refused)
        must_tell = self._leaving or self.zeroing.is_awaited or (self._released and is_idle)
        if not draft.parts and not must_tell:
            return Schedule(step=None, refused=refused)
        zeroed = self.zeroing.take(step)
        plan = StepPlan(
            epoch=epoch,
            step=step,
            started=tuple(draft.started),
            sequences=tuple(draft.parts),
            released=tuple(self._released),
            ended=tuple(leaving.sequence for leaving in self._leaving),
            zeroed=zeroed,
        )
        self._released.clear()
        self._free_leaving()
        for part, request in zip(draft.parts, draft.requests, strict=True):
            self.prefixes.keep_after(request, ends_prompt=part.samples and bool(part.token_ids))
            self._released += self._releases.after_step(part, request)
            self._blocks.note_peak(request)
        return Schedule(
            step=PlannedStep(
                plan,
                tuple(draft.requests),
                draft.work,
                draft.charges,
                seconds=self._pace.step_s(draft.work),
            ),
            refused=refused,
        )

    def _all(self) -> Iterator[Request]:
        return chain(self.running, self.waiting)

    def _queue(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=_by_order)

    def _leave(self, request: Request) -> None:
        assert request.sequence is not None, "a running request has a sequence"
        self._leaving.append(_Leaving(request.sequence, request.spec.tenant, request.tables))

    def _free_leaving(self) -> None:
        for leaving in self._leaving:
            self._blocks.release(leaving.tenant, leaving.tables)
        self._leaving.clear()
