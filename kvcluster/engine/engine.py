"""The engine, sans-IO: requests and step results go in, plans and events come out.

Nothing here waits, opens or measures anything. Time, ids and the tokenizer are given, so that one
run can be replayed exactly. `driver.py` connects it to a ring group, `service.py` to callers.
"""

import math
from itertools import count

from kvcluster.engine import admission
from kvcluster.engine.api import (
    Admitted,
    Finished,
    FinishReason,
    GenerationRecord,
    GenerationRequest,
)
from kvcluster.engine.contexts import Contexts
from kvcluster.engine.estimator import SpeedEstimator
from kvcluster.engine.failed_sequences import computation_failed
from kvcluster.engine.forecast import MIN_RETRY_S, Forecast
from kvcluster.engine.generation import Generation
from kvcluster.engine.generations import Generations
from kvcluster.engine.in_flight import StepsInFlight
from kvcluster.engine.parts import EngineParts, EngineStatistics
from kvcluster.engine.plan import StepPlan, StepResult
from kvcluster.engine.policies import ChosenPolicy, choose_policy, default_policy
from kvcluster.engine.prefixes import Prefixes
from kvcluster.engine.prompts import Prompts
from kvcluster.engine.request import Request
from kvcluster.engine.scheduler import Scheduler
from kvcluster.engine.stream import OutputText
from kvcluster.engine.tenants import TenantUses
from kvcluster.engine.zeroing import Zeroing
from kvcluster.errors import Draining, KvClusterError, RankLost
from kvcluster.types import GenerationId, TenantId


class Engine:
    """Owner of all requests and blocks of one ring group. Not thread-safe; never blocks."""

    def __init__(self, parts: EngineParts, *, epoch: int = 1) -> None:
        """Raises: ConfigError when a default policy cannot be served."""
        self.parts = parts
        self.default_policy = default_policy(parts)
        self.epoch = epoch
        self._scheduler = Scheduler(
            parts.spec,
            cache=parts.cache,
            engine=parts.config,
            partitions=parts.partitions,
            choose_route=parts.choose_route,
        )
        self._scheduler.prefixes.unix_time = parts.clock.unix
        self._estimator = SpeedEstimator()
        self.forecast = Forecast(self._scheduler, self._estimator)
        self.tenants = TenantUses(parts.clock)
        self._in_flight = StepsInFlight(parts.spec.vocab_size)
        self._generations = Generations(max_retained=parts.config.max_retained)
        self._draining: Draining | None = None
        self._ring_loss: RankLost | None = None
        self._arrivals = count(1)
        self._next_due = math.inf
        self._plan_from = math.inf
        self._prompts = Prompts(parts, self._scheduler.prefixes, self.tenants, self.forecast)
        self.contexts = Contexts(parts, self._scheduler, self._prompts, self._arrivals)

    def submit(self, spec: GenerationRequest) -> GenerationId:
        """Admit a request; its `Admitted` event is in the log when this returns.

        Raises: InvalidField, PolicyUnsupported, ModelNotFound, ContextTooLong, QuotaExceeded,
        ClusterOverloaded, DeadlineInfeasible, Draining, RankLost. Nothing is kept of a refused
        request.
        """
        chosen = self.check(spec)
        generation_id = GenerationId(self.parts.new_id())
        request = Request(generation_id, spec, chosen.policy, next(self._arrivals))
        self.contexts.begin(request)
        tokenizer = self.parts.tokenizer
        generation = Generation(
            request,
            OutputText(tokenizer.output_decoder() if tokenizer else None, spec.sampling.stop),
            self.parts.spec,
            now=self.parts.clock.monotonic(),
            unix_s=self.parts.clock.unix(),
        )
        ahead = [
            other
            for other in self._scheduler.waiting
            if other.spec.tenant == spec.tenant and other.order < request.order
        ]
        generation.log.append(
            Admitted(
                queue_position=len(ahead),
                estimated_first_token_s=self.forecast.first_token_s(spec),
                policy=str(chosen.policy),
                policy_source=chosen.source,
                policy_bound=chosen.bound,
            )
        )
        self._generations.active[generation_id] = generation
        self._scheduler.add(request, now=self.parts.clock.monotonic())
        self.tenants.admit(request)
        self._next_due = min(self._next_due, generation.next_due)
        return generation_id

    def check(self, spec: GenerationRequest) -> ChosenPolicy:
        """The policy that the request would have, if `submit` would take it now. Raises what that
        would raise."""
        admission.check(spec, self.parts.spec)
        chosen = self.contexts.policy_of(spec) or choose_policy(spec, self.parts)
        num_tokens = self.contexts.num_tokens_before(spec) + (spec.input_tokens or 1)
        self._prompts.check_length(spec, chosen.policy, num_tokens)
        if self.refusal is not None:
            raise self.refusal
        retry_after_s = self.forecast.retry_after_s()
        self.tenants.check(spec, self.active_requests, retry_after_s=retry_after_s)
        load = admission.Load(
            num_requests=len(self._generations.active),
            first_token_s=self.forecast.first_token_s(spec),
            retry_after_s=retry_after_s,
        )
        admission.check_load(spec, self.parts.config, load)
        return chosen

    def estimate_decode(self, num_tokens: int) -> float | None:
        """Seconds to generate so many tokens after the first."""
        return self._estimator.decode_s(num_tokens)

    def append_prompt(self, generation_id: GenerationId, packed_ids: bytes) -> None:
        """Add prompt tokens (little-endian u32, all within the vocabulary).

        Raises: ContextTooLong, QuotaExceeded and InvalidField (more than declared) as soon as
        they are known, PromptCorrupt after `finish_prompt`, or what ended the generation.
        """
        generation = self.find(generation_id)
        generation.raise_if_ended()
        self._prompts.append(generation.request, packed_ids)

    def prompt_room(self, generation_id: GenerationId) -> int:
        """Prompt tokens that the client should be allowed to send now; 0: hold it back."""
        return self._prompts.room(self.find(generation_id).request)

    def finish_prompt(self, generation_id: GenerationId) -> None:
        """The prompt is complete. Calling it again changes nothing.

        Raises: InvalidField (empty, or shorter than declared), or what ended the generation.
        """
        generation = self.find(generation_id)
        generation.raise_if_ended()
        self._prompts.finish(generation.request)

    def cancel(self, generation_id: GenerationId) -> None:
        """End a generation at its owner's wish. One that has ended stays as it is."""
        generation = self.find(generation_id)
        if not generation.log.is_finished:
            self._end(generation, FinishReason.CANCELLED)

    def fail(self, generation_id: GenerationId, error: KvClusterError) -> None:
        """End a generation with an error. One that has ended stays as it is."""
        generation = self.find(generation_id)
        if not generation.log.is_finished:
            self._end(generation, FinishReason.ERROR, error=error)

    def attach(self, generation_id: GenerationId) -> None:
        """Count one more reader of the events."""
        generation = self.find(generation_id)
        generation.num_readers += 1
        generation.abandoned_at = math.inf

    def detach(self, generation_id: GenerationId) -> None:
        """Count one reader less. When the last one leaves, the grace period begins."""
        if not self.knows(generation_id):
            return
        generation = self.find(generation_id)
        generation.num_readers -= 1
        if not generation.num_readers:
            grace_s = generation.request.spec.disconnect_grace_s
            generation.abandoned_at = self.parts.clock.monotonic() + grace_s
            self._next_due = min(self._next_due, generation.abandoned_at)

    def find(self, generation_id: GenerationId) -> Generation:
        """Raises: GenerationNotFound."""
        return self._generations.find(generation_id)

    def knows(self, generation_id: GenerationId) -> bool:
        return self._generations.knows(generation_id)

    def records(self, tenant: TenantId) -> tuple[GenerationRecord, ...]:
        """The tenant's generations, newest first."""
        return self._generations.records(tenant)

    def tenants_here(self) -> set[TenantId]:
        """Those of which anything is known or kept."""
        contexts = {context.tenant for context in self.contexts.all()}
        names = contexts | self._generations.tenants() | self.prefixes.tenants()
        return names | self.tenants.names()

    def forget(self, tenant: TenantId) -> None:
        """Forget what a tenant that has no unfinished generation has used, and its ended ones."""
        self._generations.forget(tenant)
        self.tenants.forget(tenant)

    def next_plan(self) -> StepPlan | None:
        """The next step for the ranks; None when there is nothing to do until something changes, or
        `next_wakeup`: where several tenants are about, the next step is planned late."""
        now = self.parts.clock.monotonic()
        self._plan_from = math.inf
        if self._ring_loss is not None:
            return None
        plan_from = self._scheduler.plan_from(self._in_flight.done_at, now)
        if now < plan_from:
            self._plan_from = plan_from
            return None
        schedule = self._scheduler.plan(
            epoch=self.epoch,
            step=self._in_flight.num_planned + 1,
            is_idle=not self._in_flight,
            now=now,
        )
        for request in schedule.refused:
            partition = self.parts.partitions.of(request.spec.tenant)
            error = admission.without_block(partition, num_tokens=len(request.tokens))
            self._give_up(request, error)
        if schedule.step is None:
            # What a refused request held is free for others only once the ranks are told.
            return self.next_plan() if schedule.refused else None
        self._in_flight.add(schedule.step, now=self.parts.clock.monotonic())
        for request in schedule.step.requests:
            if request.builds_context:
                self.contexts.planned(request)
            elif not request.is_prompt_complete and not request.is_ended:
                self.find(request.generation).room.notify()
        return schedule.step.plan

    def complete(self, result: StepResult) -> None:
        """Take in the result of the oldest step in flight. Raises RankLost when it is not that."""
        settled = self._in_flight.settle(result, now=self.parts.clock.monotonic())
        self._estimator.observe(settled.planned.plan, settled.seconds)
        self._scheduler.observe(settled.planned, settled.seconds)
        self._scheduler.zeroing.complete(result.step)
        for part, request, sampled, scored in settled.parts():
            if request.sequence == part.sequence in settled.failed:
                failure = settled.failed[part.sequence]
                error = computation_failed(request, failure, self._scheduler, self._in_flight)
                self._give_up(request, error)
            request.num_steps_in_flight -= 1
            request.num_pending -= part.samples
            # A token that was sampled after the end was found is discarded here.
            if request.is_ended:
                continue
            if request.sequence == part.sequence:
                request.num_computed = part.start + part.num_tokens
                request.count_errors(result.errors)
                self.contexts.computed(request)
            if scored:
                self.find(request.generation).deliver_scores(scored)
            if sampled is not None:
                generation = self.find(request.generation)
                reason, stop_sequence = generation.deliver(sampled)
                generation.put_off_progress(self.parts.clock.monotonic())
                if reason is not None:
                    self._end(generation, reason, stop_sequence=stop_sequence)

    def lose_ring(self, message: str) -> None:
        """The ring group is gone: every unfinished generation ends, and no request is taken until
        `restart`."""
        self._ring_loss = RankLost(message, retry_after_s=MIN_RETRY_S)
        self._in_flight.reset()
        self._end_all(RankLost(message))
        self._scheduler.reset()
        self.contexts.lose_ring()

    def restart(self, epoch: int) -> None:
        """A ring group with empty caches obeys plans of this epoch from now on."""
        self.epoch, self._ring_loss = epoch, None

    def note_ready(self) -> None:
        """The ring has proved that it works; what comes now are requests of tenants."""
        self._scheduler.forget_tenants()

    def drain(self) -> None:
        """Take no more requests; those admitted go on."""
        self._draining = Draining(
            "the server is stopping: try another one", retry_after_s=MIN_RETRY_S
        )

    def shut_down(self) -> None:
        """Take no more requests and end all that are unfinished."""
        self.drain()
        self._end_all(Draining("the server stopped before the generation was finished"))

    def tick(self) -> None:
        """Do what is due: progress events, deadlines, abandoned generations, expiry."""
        now = self.parts.clock.monotonic()
        self.contexts.expire(now)
        if now < self._next_due:
            return
        for generation in tuple(self._generations.active.values()):
            if now >= generation.deadline_at:
                self._end(generation, FinishReason.DEADLINE)
            elif now >= generation.abandoned_at:
                self._end(generation, FinishReason.CANCELLED)
            elif now >= generation.progress_at:
                generation.put_off_progress(now)
                generation.log.append(self.forecast.progress(generation))
        self._generations.expire(now)
        due = [generation.next_due for generation in self._generations.active.values()]
        self._next_due = min(math.inf, self._generations.next_expiry, *due)

    def next_wakeup(self) -> float:
        """When `tick` has something to do next, or `next_plan`, on the monotonic clock; may be
        infinite."""
        return min(self._next_due, self.contexts.next_expiry, self._plan_from)

    @property
    def refusal(self) -> KvClusterError | None:
        """Why no request is taken now; None: they are."""
        return self._draining or self._ring_loss

    @property
    def num_unfinished(self) -> int:
        return len(self._generations.active)

    @property
    def active_requests(self) -> tuple[Request, ...]:
        """Of the unfinished generations."""
        return tuple(generation.request for generation in self._generations.active.values())

    @property
    def num_known(self) -> int:
        """Generations that can still be found, ended ones included."""
        return self._generations.num_known

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def prefixes(self) -> Prefixes:
        """What is kept for later requests."""
        return self._scheduler.prefixes

    @property
    def zeroing(self) -> Zeroing:
        """What the ranks are told to zero."""
        return self._scheduler.zeroing

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            epoch=self.epoch,
            num_steps=self._in_flight.num_planned,
            num_in_flight=len(self._in_flight),
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_retained=self._generations.num_retained,
            partition=self.parts.partitions.statistics(),
            idle_on_ranks=self._scheduler.prefixes.idle_on_ranks(),
            speed=self._estimator.statistics(),
        )

    def _end(
        self,
        generation: Generation,
        reason: FinishReason,
        *,
        stop_sequence: str = "",
        error: KvClusterError | None = None,
    ) -> None:
        generation.flush_text()
        self._scheduler.end(generation.request)
        self.tenants.end(generation.request)
        generation.error = error
        generation.log.append(
            Finished(
                reason=reason,
                usage=generation.usage(),
                stop_sequence=stop_sequence,
                error_kind=type(error).__name__ if error else "",
                error_message=error.message if error else "",
                error_metadata=dict(error.metadata) if error else {},
                error_retry_after_s=error.retry_after_s if error else None,
            )
        )
        retention_s = self.parts.config.retention_s
        generation.expires_at = self.parts.clock.monotonic() + retention_s
        generation.expire_time_s = self.parts.clock.unix() + retention_s
        generation.room.notify()
        self._generations.retain(generation)
        self._next_due = min(self._next_due, generation.expires_at)

    def _end_all(self, error: KvClusterError) -> None:
        for generation in tuple(self._generations.active.values()):
            self._end(generation, FinishReason.ERROR, error=error)

    def _give_up(self, request: Request, error: KvClusterError) -> None:
        if request.builds_context:
            self.contexts.fail(request, error)
        else:
            self._end(self.find(request.generation), FinishReason.ERROR, error=error)
