"""An engine in memory: one token per UTF-8 byte of text, and the prompt is echoed as output.

It keeps the contract of `Backend` (events, back-pressure, idempotency, readers that leave) and
computes nothing. With its `gate` closed it stands still, so that a test sees what the router does.
"""

import asyncio
import math
import sys
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec

from kvcluster.engine.api import (
    Admitted,
    BackendStatus,
    Estimate,
    Event,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRecord,
    GenerationRequest,
    GenerationState,
    Opened,
    Output,
    Phase,
    Progress,
    PromptChunk,
    ShardSize,
    TenantLoad,
    TextChunk,
    TierLoad,
    Usage,
)
from kvcluster.engine.cache_api import CacheEntry, CachePurge, CachePurged
from kvcluster.errors import (
    ContextTooLong,
    GenerationNotFound,
    InvalidField,
    KvClusterError,
    PromptCorrupt,
    RequestIdConflict,
    ResumeExpired,
)
from kvcluster.policy import Menu, Method, Parameter, PlugPoint, parse_policy
from kvcluster.policy_bounds import AutoBound, MeasuredRecipe, parse_bound, resolve
from kvcluster.router.convert import pack_ids
from kvcluster.router.status import error_of_kind
from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import GenerationId, LayerGeometry, ModelSpec, Policy, TenantId

VOCAB_SIZE = 1000
MENU = Menu(
    (
        Method(
            plug_point=PlugPoint.RETENTION,
            name="window",
            meaning="the last tokens",
            parameters=(Parameter(name="size", meaning="how many", default=4096),),
        ),
        Method(plug_point=PlugPoint.CODEC, name="int4", meaning="4 bits"),
    )
)
RECIPES = (
    MeasuredRecipe(
        policy="int4", ratio=3.8, perplexity_increase=0.004, perplexity_error=0.001, recall=1.0
    ),
)
STATE_OF = {
    FinishReason.STOP: GenerationState.SUCCEEDED,
    FinishReason.LENGTH: GenerationState.SUCCEEDED,
    FinishReason.CANCELLED: GenerationState.CANCELLED,
    FinishReason.DEADLINE: GenerationState.FAILED,
    FinishReason.ERROR: GenerationState.FAILED,
}


def model_spec(name: str = "echo", max_context_tokens: int = 8_000_000) -> ModelSpec:
    layer = LayerGeometry(num_query_heads=1, num_kv_heads=1, key_dim=8, value_dim=8, scale=1.0)
    return ModelSpec(
        name=name,
        layers=(layer,),
        vocab_size=VOCAB_SIZE,
        max_context_tokens=max_context_tokens,
        eos_token_ids=(0,),
        dtype="float32",
        bytes_per_element=4,
        weights_digest="weights",
        tokenizer_digest="tokenizer",
    )


@dataclass
class FakeGeneration:
    request: GenerationRequest
    record: GenerationRecord
    ids: array = field(default_factory=lambda: array("I"))
    size: int = 0
    """Of the prompt so far, in the unit of its offsets."""
    num_computed: int = 0
    is_complete: bool = False
    uploads: dict[int, bool] = field(default_factory=lambda: {0: True})  # false: failed
    events: list[GenerationEvent] = field(default_factory=list)
    num_readers: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    running: asyncio.Task[None] | None = None
    leaving: asyncio.TimerHandle | None = None

    @property
    def finished(self) -> Finished | None:
        last = self.events[-1].event
        return last if isinstance(last, Finished) else None


class FakeBackend:
    """`gate` open: prompts are computed as they come. Closed: the engine stands still."""

    def __init__(self, spec: ModelSpec | None = None, *, window_tokens: int = 4096) -> None:
        self.spec = spec or model_spec()
        self.window_tokens = window_tokens
        self.num_counting = 0
        """Calls of `count_tokens` so far."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_ready = True
        self.failure: Exception | None = None  # raised by `open` and `append_prompt`
        self.status_failure: Exception | None = None
        self.shares = TenantShares()
        self.tier_bytes: dict[str, int] = {}
        self.tiers: dict[str, TierLoad] = {}
        self.output_text: str | None = None  # of one output token; None: its character
        self.generations: dict[GenerationId, FakeGeneration] = {}
        self.num_received_tokens = 0
        self._by_request_id: dict[tuple[TenantId, str], GenerationId] = {}

    @property
    def num_held_tokens(self) -> int:
        """Tokens of generations that have not ended; 0 means that nothing leaked."""
        return sum(len(g.ids) for g in self.generations.values() if g.finished is None)

    async def until(self, is_reached: Callable[[FakeGeneration], bool], name: str = "g0") -> None:
        """Return when the generation `name` exists and `is_reached` holds for it."""
        while name not in self.generations:
            await asyncio.sleep(0.001)
        generation = self.generations[GenerationId(name)]
        async with generation.changed:
            await generation.changed.wait_for(lambda: is_reached(generation))

    async def open(self, request: GenerationRequest) -> Opened:
        self._raise_failure()
        bound, policy = self._check(request)
        key = (request.tenant, request.request_id)
        known = self._by_request_id.get(key) if request.request_id else None
        if known is not None:
            if _body(self.generations[known].request) != _body(request):
                raise RequestIdConflict("request_id was used with another body: choose another")
            uploads = self.generations[known].uploads
            uploads[len(uploads)] = True
            return Opened(generation=known, upload=len(uploads) - 1)
        name = GenerationId(f"g{len(self.generations)}")
        record = GenerationRecord(
            generation=name,
            tenant=request.tenant,
            state=GenerationState.QUEUED,
            last_sequence=0,
            usage=_usage(0, 0),
            create_time_s=1_000.0 + len(self.generations),
            expire_time_s=None,
        )
        generation = FakeGeneration(request=request, record=record)
        self.generations[name] = generation
        self._by_request_id[key] = name
        self._emit(
            generation,
            Admitted(
                queue_position=0,
                estimated_first_token_s=0.5,
                policy=str(policy),
                policy_bound=str(bound or ""),
            ),
        )
        generation.running = asyncio.create_task(self._run(generation))
        return Opened(generation=name)

    async def append_prompt(self, name: GenerationId, _upload: int, chunk: PromptChunk) -> None:
        self._raise_failure()
        generation = self._running(name)
        ids, size = self._tokens(chunk)
        if chunk.offset > generation.size:
            raise PromptCorrupt(f"chunk.offset: want {generation.size}, got {chunk.offset}")
        if chunk.offset < generation.size:  # another upload of the same request was here first
            if generation.ids[chunk.offset : chunk.offset + size] != ids:
                raise RequestIdConflict("request_id was used with another prompt: choose another")
            return
        self._check_length(generation.request, len(generation.ids) + len(ids), is_lower_bound=True)
        generation.ids.extend(ids)
        generation.size += size
        self.num_received_tokens += len(ids)
        async with generation.changed:
            generation.changed.notify_all()
            await generation.changed.wait_for(
                lambda: (
                    len(generation.ids) - generation.num_computed <= self.window_tokens
                    or generation.finished is not None
                )
            )
        self._running(name)

    async def finish_prompt(self, name: GenerationId, _upload: int) -> None:
        generation = self._running(name)
        if not generation.ids:
            raise InvalidField("prompt", "is empty: send at least one token")
        generation.is_complete = True
        await self._notify(generation)

    async def watch(
        self, tenant: TenantId, name: GenerationId, after_sequence: int
    ) -> AsyncIterator[tuple[GenerationEvent, ...]]:
        generation = self._find(tenant, name)
        if after_sequence > len(generation.events):
            raise ResumeExpired(f"after_sequence: the last is {len(generation.events)}")
        generation.num_readers += 1
        await self._notify(generation)
        if generation.leaving is not None:
            generation.leaving.cancel()
        try:
            position = after_sequence
            while True:
                batch = tuple(generation.events[position:])
                if batch:
                    yield batch
                position += len(batch)
                if position == len(generation.events) and generation.finished is not None:
                    return
                async with generation.changed:
                    await generation.changed.wait_for(
                        lambda seen=position: len(generation.events) > seen
                    )
        finally:
            generation.num_readers -= 1
            if not generation.num_readers and generation.finished is None:
                generation.leaving = asyncio.get_running_loop().call_later(
                    generation.request.disconnect_grace_s,
                    self._end,
                    generation,
                    FinishReason.CANCELLED,
                )
            await self._notify(generation)

    async def fail(self, name: GenerationId, upload: int, error_kind: str, message: str) -> None:
        generation = self.generations[name]
        generation.uploads[upload] = False
        if not generation.is_complete and not any(generation.uploads.values()):
            error = {"error_kind": error_kind, "error_message": message}
            self._end(generation, FinishReason.ERROR, **error)

    async def cancel(self, tenant: TenantId, name: GenerationId) -> GenerationRecord:
        generation = self._find(tenant, name)
        self._end(generation, FinishReason.CANCELLED)
        return generation.record

    async def get(self, tenant: TenantId, name: GenerationId) -> GenerationRecord:
        return self._find(tenant, name).record

    async def list_generations(self, tenant: TenantId) -> tuple[GenerationRecord, ...]:
        records = [g.record for g in self.generations.values() if g.record.tenant == tenant]
        return tuple(reversed(records))

    async def count_tokens(self, model: str, chunk: PromptChunk) -> int:
        self.num_counting += 1
        await self.gate.wait()
        return len(self._tokens(chunk)[0])

    async def estimate(self, request: GenerationRequest) -> Estimate:
        reason = message = policy = ""
        try:
            policy = str(self._check(request)[1])
        except KvClusterError as error:
            reason, message = error.reason, error.message
        return Estimate(
            is_admissible=not reason,
            reason=reason,
            message=message,
            first_token_s=0.25,
            total_s=None,
            kv_bytes=64 * (request.input_tokens or 0),
            kv_bytes_left=1 << 20,
            policy=policy,
        )

    async def tenant_load(self, tenant: TenantId, limits: TenantLimits) -> TenantLoad:
        own = [g for g in self.generations.values() if g.record.tenant == tenant]
        return TenantLoad(
            num_running=sum(g.finished is None for g in own),
            input_tokens=sum(len(g.ids) for g in own),
            tiers=self.tiers,
        )

    async def list_cache_entries(self, _tenant: TenantId) -> tuple[CacheEntry, ...]:
        return ()

    async def purge_cache_entries(self, _tenant: TenantId, _wanted: CachePurge) -> CachePurged:
        return CachePurged()

    async def apply_shares(self, shares: TenantShares) -> None:
        if self.status_failure is not None:
            raise self.status_failure
        self.shares = shares

    async def status(self) -> BackendStatus:
        if self.status_failure is not None:
            raise self.status_failure
        return BackendStatus(
            is_ready=self.is_ready,
            detail="",
            model=self.spec,
            menu=MENU,
            epoch=1,
            num_ranks=1,
            tier_bytes=self.tier_bytes,
            num_running=sum(g.finished is None for g in self.generations.values()),
            num_waiting=0,
            ranks=(ShardSize(rank=0, node="here", num_blocks=8, num_free_blocks=8),),
        )

    async def _run(self, generation: FakeGeneration) -> None:
        deadline_s = generation.request.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await self._prefill(generation)
                await self._decode(generation)
            self._end(generation, FinishReason.LENGTH)
        except TimeoutError:
            self._end(generation, FinishReason.DEADLINE)

    async def _prefill(self, generation: FakeGeneration) -> None:
        def has_work() -> bool:
            return generation.is_complete or generation.num_computed < len(generation.ids)

        while not (generation.is_complete and generation.num_computed == len(generation.ids)):
            async with generation.changed:
                await generation.changed.wait_for(has_work)
            await self.gate.wait()
            generation.num_computed = len(generation.ids)
            self._set_state(generation, GenerationState.RUNNING)
            self._emit(
                generation,
                Progress(
                    phase=Phase.PREFILLING,
                    done_tokens=generation.num_computed,
                    total_tokens=generation.request.input_tokens or 0,
                    cached_tokens=0,
                    estimated_remaining_s=None,
                ),
            )
            await self._notify(generation)

    async def _decode(self, generation: FakeGeneration) -> None:
        for index in range(generation.request.max_output_tokens):
            await self.gate.wait()
            token = generation.ids[index % len(generation.ids)]
            text = chr(token) if self.output_text is None else self.output_text
            self._emit(generation, Output(index=index, text=text, token_ids=(token,)))
            await self._notify(generation)
            await asyncio.sleep(0)

    def _end(self, generation: FakeGeneration, reason: FinishReason, **error: str) -> None:
        if generation.finished is not None:
            return
        outputs = sum(isinstance(event.event, Output) for event in generation.events)
        usage = _usage(len(generation.ids), outputs)
        self._emit(generation, Finished(reason=reason, usage=usage, **error))
        self._set_state(generation, STATE_OF[reason])
        if generation.running is not None and generation.running is not asyncio.current_task():
            generation.running.cancel()
        self._notifying = asyncio.ensure_future(self._notify(generation))

    def _emit(self, generation: FakeGeneration, event: Event) -> None:
        sequence = len(generation.events) + 1
        generation.events.append(
            GenerationEvent(generation=generation.record.generation, sequence=sequence, event=event)
        )
        generation.record = msgspec.structs.replace(generation.record, last_sequence=sequence)

    def _set_state(self, generation: FakeGeneration, state: GenerationState) -> None:
        generation.record = msgspec.structs.replace(generation.record, state=state)

    async def _notify(self, generation: FakeGeneration) -> None:
        async with generation.changed:
            generation.changed.notify_all()

    def _find(self, tenant: TenantId, name: GenerationId) -> FakeGeneration:
        generation = self.generations.get(name)
        if generation is None or generation.record.tenant != tenant:
            raise GenerationNotFound(f"{name} in the words of the engine")
        return generation

    def _running(self, name: GenerationId) -> FakeGeneration:
        generation = self.generations[name]
        finished = generation.finished
        if finished is not None and finished.reason is not FinishReason.LENGTH:
            raise error_of_kind(finished.error_kind, "the generation has ended")
        return generation

    def _tokens(self, chunk: PromptChunk) -> tuple[array, int]:
        ids = array("I")
        raw = (
            pack_ids(list(chunk.text.encode()))
            if isinstance(chunk, TextChunk)
            else chunk.packed_ids
        )
        ids.frombytes(raw)
        if sys.byteorder == "big":
            ids.byteswap()
        if ids and max(ids) >= self.spec.vocab_size:
            raise InvalidField("prompt", f"token id {max(ids)} is not below {self.spec.vocab_size}")
        return ids, len(ids)

    def _check(self, request: GenerationRequest) -> tuple[AutoBound | None, Policy]:
        if request.max_output_tokens < 1:
            raise InvalidField("max_output_tokens", "want at least 1, got 0")
        temperature = request.sampling.temperature
        if math.isnan(temperature) or temperature < 0:
            raise InvalidField("sampling.temperature", f"want 0 or more, got {temperature}")
        self._check_length(request, request.input_tokens or 0, is_lower_bound=False)
        bound = parse_bound(request.policy)
        return bound, parse_policy(resolve(bound, RECIPES) if bound else request.policy, MENU)

    def _check_length(
        self, request: GenerationRequest, num_prompt_tokens: int, *, is_lower_bound: bool
    ) -> None:
        needed = num_prompt_tokens + request.max_output_tokens
        if needed > self.spec.max_context_tokens:
            raise ContextTooLong(
                num_tokens=needed,
                limit_tokens=self.spec.max_context_tokens,
                is_lower_bound=is_lower_bound,
            )

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure


def _body(request: GenerationRequest) -> GenerationRequest:
    return msgspec.structs.replace(request, deadline_s=None, limits=NO_LIMITS)


def _usage(input_tokens: int, output_tokens: int) -> Usage:
    return Usage(
        input_tokens=input_tokens,
        cached_input_tokens=0,
        output_tokens=output_tokens,
        kv_bytes=64 * input_tokens,
        kv_bytes_uncompressed=64 * input_tokens,
    )
