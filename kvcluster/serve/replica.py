"""The engine as a Ray Serve deployment: one replica owns one ring group."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from kvcluster import log
from kvcluster.cluster.ring_group import RingGroup
from kvcluster.config import ClusterConfig
from kvcluster.engine.api import (
    BackendStatus,
    Estimate,
    GenerationEvent,
    GenerationRecord,
    GenerationRequest,
    Opened,
    PromptChunk,
    TenantLoad,
)
from kvcluster.engine.cache_api import CacheEntry, CachePurge, CachePurged
from kvcluster.engine.service import EngineService
from kvcluster.errors import ErrorRecord, KvClusterError, RankLost
from kvcluster.freed_memory import overwrite_freed_memory
from kvcluster.garbage import exempt_living
from kvcluster.model.tokenizer import load_tokenizer
from kvcluster.serve.assembly import engine_service
from kvcluster.serve.remote_contexts import ReplicaContexts
from kvcluster.serve.warm_up import warm_up
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import GenerationId, ModelSpec, TenantId

T = TypeVar("T")

_RESTART_PAUSE_S = 1.0

logger = log.get_logger(__name__)


class Replica(ReplicaContexts):
    """Starts a ring group, serves it, and starts it again when a rank is lost.

    The methods of `Backend` answer calls from the routers: see `remote`.
    """

    def __init__(self, config: ClusterConfig) -> None:
        log.configure(level=config.log.level, as_json=True)
        overwrite_freed_memory()
        self._config = config
        self._ring = RingGroup(config)
        self._service: EngineService | None = None
        self._starting = asyncio.get_running_loop().create_task(self._start())
        self._supervising: asyncio.Task[None] | None = None

    async def startup(self) -> ErrorRecord | None:
        """Wait until the cluster serves. What stopped it, as a value, when it cannot."""
        try:
            await self._starting
        except KvClusterError as error:
            return error.to_record()
        return None

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises. Raises: RankLost."""
        tasks = [task for task in (self._starting, self._supervising) if task is not None]
        has_failed = self._service is not None and self._service.has_failed
        if has_failed or any(_has_ended(task) for task in tasks):
            raise RankLost("the engine cannot go on; a new one has to be started")

    async def drain(self) -> None:
        """Take no more requests; return when those admitted have ended."""
        if self._service is not None:
            await self._service.drain()

    async def stop(self) -> None:
        """End everything: generations, tasks, ranks."""
        if self._supervising is not None:
            self._supervising.cancel()
        self._starting.cancel()
        if self._service is not None:
            await self._service.stop()
        await self._ring.stop()

    async def open(self, request: GenerationRequest) -> Opened | ErrorRecord:
        return await self._answer(lambda engine: engine.open(request))

    async def append_prompt(
        self, generation: GenerationId, upload: int, chunk: PromptChunk
    ) -> ErrorRecord | None:
        return await self._answer(lambda engine: engine.append_prompt(generation, upload, chunk))

    async def finish_prompt(self, generation: GenerationId, upload: int) -> ErrorRecord | None:
        return await self._answer(lambda engine: engine.finish_prompt(generation, upload))

    async def watch(
        self, tenant: TenantId, generation: GenerationId, after_sequence: int
    ) -> AsyncIterator[tuple[GenerationEvent, ...] | ErrorRecord]:
        try:
            events = self._engine().watch(tenant, generation, after_sequence)
            async with aclosing(events) as batches:
                async for batch in batches:
                    yield batch
        except KvClusterError as error:
            yield error.to_record()

    async def fail(
        self, generation: GenerationId, upload: int, error_kind: str, message: str
    ) -> ErrorRecord | None:
        return await self._answer(
            lambda engine: engine.fail(generation, upload, error_kind, message)
        )

    async def cancel(
        self, tenant: TenantId, generation: GenerationId
    ) -> GenerationRecord | ErrorRecord:
        return await self._answer(lambda engine: engine.cancel(tenant, generation))

    async def get(
        self, tenant: TenantId, generation: GenerationId
    ) -> GenerationRecord | ErrorRecord:
        return await self._answer(lambda engine: engine.get(tenant, generation))

    async def list_generations(
        self, tenant: TenantId
    ) -> tuple[GenerationRecord, ...] | ErrorRecord:
        return await self._answer(lambda engine: engine.list_generations(tenant))

    async def count_tokens(self, model: str, chunk: PromptChunk) -> int | ErrorRecord:
        return await self._answer(lambda engine: engine.count_tokens(model, chunk))

    async def estimate(self, request: GenerationRequest) -> Estimate | ErrorRecord:
        return await self._answer(lambda engine: engine.estimate(request))

    async def tenant_load(self, tenant: TenantId, limits: TenantLimits) -> TenantLoad | ErrorRecord:
        return await self._answer(lambda engine: engine.tenant_load(tenant, limits))

    async def list_cache_entries(self, tenant: TenantId) -> tuple[CacheEntry, ...] | ErrorRecord:
        return await self._answer(lambda engine: engine.list_cache_entries(tenant))

    async def purge_cache_entries(
        self, tenant: TenantId, wanted: CachePurge
    ) -> CachePurged | ErrorRecord:
        return await self._answer(lambda engine: engine.purge_cache_entries(tenant, wanted))

    async def apply_shares(self, shares: TenantShares) -> ErrorRecord | None:
        return await self._answer(lambda engine: engine.apply_shares(shares))

    async def status(self) -> BackendStatus | ErrorRecord:
        return await self._answer(lambda engine: engine.status())

    async def _start(self) -> None:
        spec = await self._ring.start()
        tokenizer = await asyncio.to_thread(load_tokenizer, self._config.model)
        self._service = engine_service(
            self._config,
            spec,
            self._ring,
            nodes=self._ring.nodes,
            epoch=self._ring.epoch,
            tokenizer=tokenizer,
        )
        self._service.start()
        await warm_up(self._service, self._config, spec, with_gpus=self._ring.has_gpus)
        exempt_living()
        self._service.mark_ready()
        self._supervising = asyncio.create_task(self._supervise(self._service, spec))

    async def _supervise(self, service: EngineService, spec: ModelSpec) -> None:
        """Start the ring again whenever a rank is lost. Its requests have ended with RankLost."""
        while True:
            await self._wait_lost(service)
            while not await self._restart(service, spec):
                await asyncio.sleep(_RESTART_PAUSE_S)

    async def _wait_lost(self, service: EngineService) -> None:
        """Return when a rank is lost: a step says so, or its process ends between steps."""
        waits = [
            asyncio.ensure_future(service.wait_ring_lost()),
            asyncio.ensure_future(self._ring.wait_lost()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        service.lose_ring("a rank of the ring group is gone")

    async def _restart(self, service: EngineService, spec: ModelSpec) -> bool:
        """Whether a new ring group has given a token."""
        await self._ring.stop()
        try:
            await self._ring.start()
            service.restart(self._ring.epoch)
            await warm_up(service, self._config, spec, with_gpus=self._ring.has_gpus)
        except KvClusterError as error:
            logger.error("ring_restart_failed", error=type(error).__name__)
            return False
        service.mark_ready()
        logger.info("ring_restarted", epoch=self._ring.epoch)
        return True

    async def _answer(self, call: Callable[[EngineService], Awaitable[T]]) -> T | ErrorRecord:
        """The value of a call, or the refusal as a value: see `remote`."""
        try:
            return await call(self._engine())
        except KvClusterError as error:
            return error.to_record()

    def _engine(self) -> EngineService:
        if self._service is None:
            raise RankLost("the engine is starting: try again", retry_after_s=1.0)
        return self._service


def _has_ended(task: asyncio.Task[None]) -> bool:
    """Whether a task ended by an error."""
    return task.done() and not task.cancelled() and task.exception() is not None
