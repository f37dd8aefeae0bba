"""What the next step computes: continuous batching over one ring group's blocks.

Every running request whose prompt is done decodes one token; the rest of the step's tokens go to
prefill chunks, in order of priority, then arrival. One order decides everything: who is served
first is preempted last, so the first in order always gets on and nothing can livelock.

Blocks of a sequence that leaves are free for the plan after the one that tells the ranks so.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, Protocol

from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.partitions import CachePartitions
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.plan import NewBlock, Release, SequenceStart, SequenceStep, StepPlan
from kvcluster.engine.releases import BlockReleases
from kvcluster.engine.request import Request, RequestState
from kvcluster.engine.sequence_blocks import SequenceBlocks
from kvcluster.engine.turns import Turns
from kvcluster.types import LayerGeometry, ModelSpec, Route, SequenceId, TenantId

_MAX_SCORED_LOGITS = 1 << 26
"""Of the rows of a step that score their prompt: 256 MiB of float32."""

_by_order = attrgetter("order")


class RouteChoice(Protocol):
    """The cheapest way for a chunk's queries to meet history on other ranks
    (`attention.strategy.choose_route`)."""

    def __call__(
        self,
        layers: Sequence[LayerGeometry],
        *,
        num_new_tokens: int,
        num_history_tokens: int,
        num_ranks: int,
        element_bytes: float,
        stored_share: float,
    ) -> Route: ...


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan, and whose parts it has."""

    plan: StepPlan
    requests: tuple[Request, ...]
    """One for each of `plan.sequences`."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a look at the queues gave."""

    step: PlannedStep | None
    """None: nothing to do now."""
    refused: tuple[Request, ...]
    """Requests that cannot get a block even alone. The caller ends them."""


@dataclass(slots=True)
class _Draft:
    started: list[SequenceStart] = field(default_factory=list)
    parts: list[SequenceStep] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    refused: list[Request] = field(default_factory=list)
    is_short: bool = False
    """A running request got no block: what comes free is its own, nobody is admitted."""


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
        self._chunk_tokens = max(engine.prefill_chunk_tokens, cache.block_size)
        self._scored_tokens = max(_MAX_SCORED_LOGITS // spec.vocab_size, cache.block_size)
        self._config = engine
        self._partitions = partitions
        self._choose_route = choose_route
        self._num_sequences = 0
        self._blocks = SequenceBlocks(spec, cache=cache, engine=engine, partitions=partitions)
        self._releases = BlockReleases(partitions, spec.windows, block_size=cache.block_size)
        self._leaving: list[_Leaving] = []
        self._released: list[Release] = []

    def add(self, request: Request) -> None:
        """Queue a request. Its prompt may still be on the way."""
        bisect.insort(self.waiting, request, key=_by_order)

    def end(self, request: Request) -> None:
        """Take a request out. Its blocks come free with the next plan."""
        if request.state is RequestState.RUNNING:
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
            self.add(request)
        self.running.clear()
        self._free_leaving()
        self._released.clear()

    def plan(self, *, epoch: int, step: int, is_idle: bool) -> Schedule:
        """Choose the next step and account for it as if it had run.

        `is_idle`: no step is in flight, so that releases have no later plan to ride on.
        """
        draft = _Draft()
        for request in tuple(self.running):
            if request.can_decode:
                self._extend(draft, request, request.num_planned + 1)
        # Decodes never starve prefill: a whole block always fits.
        budget = max(self._chunk_tokens - len(draft.parts), self._block_size)
        self._plan_prefill(draft, budget)
        return self._seal(draft, epoch=epoch, step=step, is_idle=is_idle)

    def _plan_prefill(self, draft: _Draft, budget: int) -> None:
        # No overtaking among those who wait: a large request would wait for ever behind small ones.
        # But a tenant whose own requests fill its limit holds nobody else up.
        admits, turns = True, Turns(self.running)
        in_order = heapq.merge(tuple(self.running), tuple(self.waiting), key=_by_order)
        for request in in_order:
            if budget < 1:
                return
            if request.state is RequestState.RUNNING:
                budget -= self._prefill(draft, request, budget)
            elif admits and not draft.is_short and request.prefill_end(self._block_size):
                if not turns.are_left(request):
                    continue
                used = self._admit(draft, request, budget)
                admits = used > 0
                if admits:
                    turns.take(request)
                budget -= used

    def _prefill(self, draft: _Draft, request: Request, budget: int) -> int:
        end = self._chunk_end(request, budget)
        return self._extend(draft, request, end) if end > request.num_planned else 0

    def _chunk_end(self, request: Request, budget: int) -> int:
        end = request.prefill_end(self._block_size)
        region = self._blocks.partition(request).exact_region(request.policy.storage)
        end = region.chunk_end(request.num_planned, end, self._block_size)
        if request.spec.sampling.prompt_logprobs is not None:
            budget = min(budget, self._scored_tokens)
        if request.survivors is not None:
            end = request.survivors.chunk_end(request.num_planned, end)
        within = request.num_planned + budget
        if end > within:
            end = within // self._block_size * self._block_size
        return end

    def _extend(self, draft: _Draft, request: Request, end: int) -> int:
        """Plan a running request up to `end`, or as far as its blocks go; returns its tokens."""
        start = request.num_planned
        covered, appended = self._blocks.cover(request, end)
        if covered <= start:
            self._make_room(draft, request)
            return 0
        self._add_step(draft, request, covered, appended)
        return covered - start

    def _make_room(self, draft: _Draft, request: Request) -> None:
        draft.is_short = True
        if self._leaving:
            return
        last = self.running[-1]
        if last is not request:
            self._preempt(last)
        elif len(self.running) == 1:
            draft.refused.append(request)
        # Otherwise the last in order waits for the others: they finish, or preempt it.

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._leave(request)
        request.preempt()
        self.add(request)

    def _admit(self, draft: _Draft, request: Request, budget: int) -> int:
        is_full = len(self.running) >= self._config.max_running
        if is_full or request.num_steps_in_flight:
            return 0
        if self.running and not self._blocks.has_room(request, len(self.running)):
            return 0
        return self._start(draft, request, budget)

    def _start(self, draft: _Draft, request: Request, budget: int) -> int:
        self._blocks.open(request)
        end = self._chunk_end(request, budget)
        covered, appended = self._blocks.cover(request, end)
        if not covered:
            self._blocks.release(request.spec.tenant, request.tables)
            request.let_go()
            if end and not self.running and not self._leaving:
                draft.refused.append(request)
            return 0
        self._num_sequences += 1
        sequence = SequenceId(self._num_sequences)
        request.start(sequence)
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=_by_order)
        draft.started.append(SequenceStart(sequence, request.spec.sampling, request.policy))
        self._add_step(draft, request, covered, appended)
        return covered

    def _add_step(
        self, draft: _Draft, request: Request, end: int, appended: Sequence[NewBlock]
    ) -> None:
        start = request.num_planned
        is_decode, survivors = request.has_sampled, request.survivors
        samples = is_decode or (request.is_prompt_complete and end == len(request.tokens))
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
        if scoring is not None:
            request.num_scored = scoring.below
        request.num_planned = end
        request.num_steps_in_flight += 1
        if samples:
            request.has_sampled = True
            request.num_pending += 1

    def _route(self, request: Request, num_new_tokens: int) -> Route:
        if self._config.history_route != "auto":
            return Route(self._config.history_route)
        num_history_tokens, survivors = request.num_planned, request.survivors
        if survivors is not None:
            num_history_tokens = survivors.num_held(num_history_tokens)
        return self._choose_route(
            self._spec.layers,
            num_new_tokens=num_new_tokens,
            num_history_tokens=num_history_tokens,
            num_ranks=self._partitions.num_ranks,
            element_bytes=self._spec.bytes_per_element,
            stored_share=self._blocks.partition(request).stored_share(request.policy.storage),
        )

    def _seal(self, draft: _Draft, *, epoch: int, step: int, is_idle: bool) -> Schedule:
        refused = tuple(draft.refused)
        must_tell = self._leaving or (self._released and is_idle)
        if not draft.parts and not must_tell:
            return Schedule(step=None, refused=refused)
        plan = StepPlan(
            epoch=epoch,
            step=step,
            started=tuple(draft.started),
            sequences=tuple(draft.parts),
            released=tuple(self._released),
            ended=tuple(leaving.sequence for leaving in self._leaving),
        )
        self._released.clear()
        self._free_leaving()
        for part, request in zip(draft.parts, draft.requests, strict=True):
            self._released += self._releases.after_step(part, request)
            self._blocks.note_peak(request)
        return Schedule(step=PlannedStep(plan, tuple(draft.requests)), refused=refused)

    def _leave(self, request: Request) -> None:
        assert request.sequence is not None, "a running request has a sequence"
        self._leaving.append(_Leaving(request.sequence, request.spec.tenant, request.tables))

    def _free_leaving(self) -> None:
        for leaving in self._leaving:
            self._blocks.release(leaving.tenant, leaving.tables)
        self._leaving.clear()
