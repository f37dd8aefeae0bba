"""The engine as its callers see it: the `Backend` of one ring group. Runs in the engine process.

Adds to the engine what needs waiting or memory of the caller: idempotency keys, following events;
prompts come in through `intake`.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.engine.api import (
    BackendStatus,
    Estimate,
    FinishReason,
    GenerationEvent,
    GenerationRecord,
    GenerationRequest,
    Opened,
    PromptChunk,
    ShardSize,
    TenantLoad,
)
from kvcluster.engine.cache_api import CacheEntry, CachePurge, CachePurged
from kvcluster.engine.cache_entries import CacheEntries
from kvcluster.engine.context_service import ContextService
from kvcluster.engine.context_stores import ContextStores
from kvcluster.engine.deleted_tenants import DeletedTenants
from kvcluster.engine.driver import EngineDriver, Executor
from kvcluster.engine.engine import Engine
from kvcluster.engine.footprint import footprint, held_bytes
from kvcluster.engine.generation import Generation
from kvcluster.engine.intake import FEEDER_SILENCE_S, PromptIntake
from kvcluster.engine.policies import choose_policy
from kvcluster.engine.request import TOKEN_BYTES
from kvcluster.engine.tiers import TenantTiers
from kvcluster.engine.upload import PromptUpload, check_vocabulary, raw_chunk
from kvcluster.errors import (
    ErrorRecord,
    GenerationNotFound,
    KvClusterError,
    ModelNotFound,
    QuotaExceeded,
    RequestIdConflict,
    from_record,
)
from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import GenerationId, Policy, TenantId


class EngineService(ContextService):
    """A `Backend` in the engine's own process and event loop."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        *,
        nodes: Sequence[str],
        feeder_silence_s: float = FEEDER_SILENCE_S,
    ) -> None:
        """`nodes`: where each rank runs, for `status`. `feeder_silence_s`: how long a retry waits
        for the upload it follows."""
        self._parts = engine.parts
        self._driver = EngineDriver(engine, executor)
        stores = self._parts.stores
        super().__init__(
            engine,
            None if stores is None else ContextStores(engine, stores, wake=self._driver.wake),
            wake=self._driver.wake,
        )
        self._nodes = tuple(nodes)
        self._is_marked_ready = False
        self._intake = PromptIntake(
            engine, wake=self._driver.wake, feeder_silence_s=feeder_silence_s
        )
        self._keys: dict[tuple[TenantId, str], GenerationId] = {}
        self._deleted = DeletedTenants(engine, wake=self._driver.wake)
        self._tiers = TenantTiers(
            self._parts.partitions, None if stores is None else stores.ledgers
        )

    def start(self) -> None:
        """Begin to run steps. Requests may be opened from now on."""
        self._driver.start()
        if self._stores is not None:
            self._stores.start()

    def mark_ready(self) -> None:
        """A token has been generated through the whole ring."""
        self._is_marked_ready = True
        self._engine.note_ready()
        self._tiers.enforce()

    async def wait_ring_lost(self) -> None:
        """Return when a rank is lost. Every unfinished generation has ended with RankLost."""
        await self._driver.wait_ring_lost()

    @property
    def has_failed(self) -> bool:
        """The engine itself has stopped because of a fault: it has to be replaced."""
        return self._driver.has_failed

    def lose_ring(self, message: str) -> None:
        """A rank was lost while no step ran."""
        self._driver.lose_ring(message)

    def restart(self, epoch: int) -> None:
        """The ring group was started again, in this epoch. Ready once `mark_ready` is called."""
        self._is_marked_ready = False
        self._tiers.hold_back()
        self._driver.restart(epoch)

    async def drain(self) -> None:
        """Take no more requests; return when those admitted have ended, and contexts are where they
        are kept."""
        self._engine.drain()
        await self._driver.wait_idle()
        if self._stores is not None:
            await self._stores.wait_idle()

    async def stop(self) -> None:
        """End what is unfinished, with an error for its reader, and every task."""
        if self._stores is not None:
            await self._stores.stop()
        await self._driver.stop()

    async def open(self, request: GenerationRequest) -> Opened:
        key = (request.tenant, request.request_id)
        if request.context and key not in self._keys:
            await self._bring_for(request)
        known = self._keys.get(key)
        if known is not None and self._holds_key(known):
            prompt = self._intake.find(known)
            if _body(prompt.request) != _body(request):
                raise RequestIdConflict(
                    f"request_id {request.request_id!r} was used with another body: use a new one"
                )
            return Opened(generation=known, upload=prompt.add_retry())
        self._forget_expired()
        try:
            generation = self._engine.submit(request)
        except QuotaExceeded:
            self._engine.tenants.of(request.tenant).num_refused += 1
            raise
        self._intake.expect(generation, request)
        if request.request_id:
            self._keys[key] = generation
        self._driver.wake()
        return Opened(generation=generation)

    async def append_prompt(
        self, generation: GenerationId, upload: int, chunk: PromptChunk
    ) -> None:
        await self._intake.append(generation, upload, chunk)

    async def finish_prompt(self, generation: GenerationId, upload: int) -> None:
        await self._intake.finish(generation, upload)

    async def watch(
        self, tenant: TenantId, generation: GenerationId, after_sequence: int
    ) -> AsyncGenerator[tuple[GenerationEvent, ...], None]:
        found = self._owned(tenant, generation)
        # A cursor that is refused is no reader whose leaving could end the generation.
        found.log.after(after_sequence)
        self._engine.attach(generation)
        try:
            async with aclosing(found.log.follow(after_sequence)) as batches:
                async for events in batches:
                    yield events
        finally:
            self._engine.detach(generation)
            self._driver.wake()

    async def fail(
        self, generation: GenerationId, upload: int, error_kind: str, message: str
    ) -> None:
        record = ErrorRecord(kind=error_kind, message=message, metadata={})
        self._intake.leave(generation, upload, from_record(record))

    async def cancel(self, tenant: TenantId, generation: GenerationId) -> GenerationRecord:
        found = self._owned(tenant, generation)
        if not found.log.is_finished:
            self._intake.find(generation).is_cancelled = True
        self._engine.cancel(generation)
        self._driver.wake()
        return found.record()

    async def get(self, tenant: TenantId, generation: GenerationId) -> GenerationRecord:
        return self._owned(tenant, generation).record()

    async def list_generations(self, tenant: TenantId) -> tuple[GenerationRecord, ...]:
        return self._engine.records(tenant)

    async def count_tokens(self, model: str, chunk: PromptChunk) -> int:
        spec = self._parts.spec
        if model != spec.name:
            raise ModelNotFound(f"model {model!r} is not served here; {spec.name!r} is")
        raw_chunk(chunk)
        upload = PromptUpload(GenerationRequest(model=model, max_output_tokens=1))
        packed_ids = await upload.encode(chunk, self._parts.tokenizer) + await upload.finish()
        check_vocabulary(packed_ids, spec.vocab_size)
        return len(packed_ids) // TOKEN_BYTES

    async def estimate(self, request: GenerationRequest) -> Estimate:
        reason = message = ""
        policy: Policy | None = None
        try:
            policy = choose_policy(request, self._parts).policy
            self._engine.check(request)
        except KvClusterError as error:
            reason, message = error.reason, error.message
        first_token_s = self._engine.forecast.first_token_s(request)
        decode_s = self._engine.estimate_decode(request.max_output_tokens - 1)
        total_s = None if first_token_s is None or decode_s is None else first_token_s + decode_s
        partition = self._parts.partitions.of(request.tenant)
        block_bytes = block_bytes_per_group(self._parts.spec, self._parts.cache.block_size)
        return Estimate(
            is_admissible=not reason,
            reason=reason,
            message=message,
            first_token_s=first_token_s,
            total_s=total_s,
            kv_bytes=self._num_bytes(request, policy or Policy()),
            kv_bytes_left=_weighted(partition.free_per_group(), block_bytes),
            policy=str(policy or ""),
        )

    async def tenant_load(self, tenant: TenantId, limits: TenantLimits) -> TenantLoad:
        own = [each for each in self._engine.active_requests if each.spec.tenant == tenant]
        block_bytes = block_bytes_per_group(self._parts.spec, self._parts.cache.block_size)
        tables = [table for request in own for table in request.tables]
        kv_bytes = held_bytes(tables, self._parts.partitions.of(tenant), block_bytes)
        kv_bytes += sum(_weighted(table.num_beside, block_bytes) for table in tables)
        load = self._engine.tenants.load(tenant, limits, own, kv_bytes)
        return msgspec.structs.replace(load, tiers=self._tiers.loads(tenant))

    async def list_cache_entries(self, tenant: TenantId) -> tuple[CacheEntry, ...]:
        return tuple(self._kept(tenant).entries(self._parts.new_id))

    async def purge_cache_entries(self, tenant: TenantId, wanted: CachePurge) -> CachePurged:
        purged, dropped = self._kept(tenant).purge(wanted)
        zeroed = asyncio.Event()
        shared = self._engine.prefixes.cache(tenant).shared
        self._engine.zeroing.add(shared, dropped, zeroed.set)
        self._driver.wake()
        await zeroed.wait()
        return purged

    async def apply_shares(self, shares: TenantShares) -> None:
        self._tiers.apply(shares)
        self._driver.wake()
        await self._deleted.apply(shares)
        if self._stores is not None:
            await self._stores.apply(shares)

    async def status(self) -> BackendStatus:
        statistics = self._engine.statistics()
        refusal = self._engine.refusal
        detail = "no token has been generated through the whole ring yet"
        if self._is_marked_ready:
            detail = refusal.message if refusal else "serving"
        return BackendStatus(
            is_ready=self._is_marked_ready and refusal is None,
            detail=detail,
            model=self._parts.spec,
            menu=self._parts.menu,
            default_policy=self._engine.default_policy,
            epoch=statistics.epoch,
            num_ranks=len(statistics.partition.ranks),
            tier_bytes=self._tiers.total_bytes,
            num_running=statistics.num_running,
            num_waiting=statistics.num_waiting,
            ranks=tuple(
                ShardSize(
                    rank=rank,
                    node=node,
                    num_blocks=sizes.num_blocks,
                    num_free_blocks=sizes.num_free + idle,
                )
                for rank, (node, sizes, idle) in enumerate(
                    zip(
                        self._nodes,
                        statistics.partition.ranks,
                        statistics.idle_on_ranks,
                        strict=True,
                    )
                )
            ),
        )

    async def _bring_for(self, request: GenerationRequest) -> None:
        """Have the request's context in memory, where the request would be taken. Raises: as
        `Engine.check` and `ContextStores.bring`."""
        await self._wait_known()
        self._engine.check(request)
        await self._bring(self._contexts.find(request.tenant, request.context))

    def _owned(self, tenant: TenantId, generation: GenerationId) -> Generation:
        found = self._engine.find(generation)
        if found.tenant != tenant:
            # Word for word what a generation that does not exist gives.
            raise GenerationNotFound(
                f"no generation {generation!r}: it never was, or its events are no longer kept"
            )
        return found

    def _kept(self, tenant: TenantId) -> CacheEntries:
        cache = self._engine.prefixes.cache(tenant)
        return CacheEntries(cache, self._parts.spec, self._parts.cache.block_size)

    def _holds_key(self, generation: GenerationId) -> bool:
        """Whether a retry attaches to it: not when it failed, ran late or was abandoned, since a
        retry after that is meant to run."""
        if not self._engine.knows(generation):
            return False
        finished = self._engine.find(generation).log.finished
        if finished is None or finished.reason in (FinishReason.STOP, FinishReason.LENGTH):
            return True
        return self._intake.find(generation).is_cancelled

    def _forget_expired(self) -> None:
        if self._intake.forget_expired():
            self._keys = {
                key: generation
                for key, generation in self._keys.items()
                if self._engine.knows(generation)
            }

    def _num_bytes(self, request: GenerationRequest, policy: Policy) -> int:
        return footprint(
            policy,
            self._parts.spec,
            (request.input_tokens or 1) + request.max_output_tokens - 1,
            self._parts.partitions.of(request.tenant),
            block_size=self._parts.cache.block_size,
            chunk_tokens=self._parts.config.prefill_chunk_tokens,
        ).num_bytes


def _body(request: GenerationRequest) -> GenerationRequest:
    """The request without what may differ between two tries of one call: the time that is left,
    and limits that were changed meanwhile."""
    return msgspec.structs.replace(request, deadline_s=None, limits=NO_LIMITS)


def _weighted(counts: Sequence[int], weights: Sequence[int]) -> int:
    return sum(count * weight for count, weight in zip(counts, weights, strict=True))
