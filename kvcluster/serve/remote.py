"""An engine in another process, called over a Ray Serve deployment handle.

`Replica` and `RemoteBackend` are the two ends of one wire: each method of `Backend` is a
call of the same name. Refusals travel as values, because an exception that crosses Ray is logged
with its traceback at every hop, and a refusal is not a fault.
"""

from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

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
from kvcluster.errors import ErrorRecord, RankLost, from_record
from kvcluster.serve.remote_contexts import RemoteContexts
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import GenerationId, TenantId

T = TypeVar("T")

Events = tuple[GenerationEvent, ...]


class RemoteBackend(RemoteContexts):
    """A `Backend` whose engine runs in the replica behind `handle`."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle
        self._watching = handle.options(stream=True)

    async def open(self, request: GenerationRequest) -> Opened:
        return await _value(self._handle.open.remote(request))

    async def append_prompt(
        self, generation: GenerationId, upload: int, chunk: PromptChunk
    ) -> None:
        await _value(self._handle.append_prompt.remote(generation, upload, chunk))

    async def finish_prompt(self, generation: GenerationId, upload: int) -> None:
        await _value(self._handle.finish_prompt.remote(generation, upload))

    async def watch(
        self, tenant: TenantId, generation: GenerationId, after_sequence: int
    ) -> AsyncIterator[Events]:
        stream: Any = self._watching.watch.remote(tenant, generation, after_sequence)
        try:
            async for batch in stream:
                if isinstance(batch, ErrorRecord):
                    raise from_record(batch)
                yield batch
        except (RayError, RayServeException) as error:
            raise _engine_gone() from error
        finally:
            # The reader may stop early: the engine must learn that nobody reads any more.
            with suppress(RayError, RayServeException):
                stream.cancel()

    async def fail(
        self, generation: GenerationId, upload: int, error_kind: str, message: str
    ) -> None:
        await _value(self._handle.fail.remote(generation, upload, error_kind, message))

    async def cancel(self, tenant: TenantId, generation: GenerationId) -> GenerationRecord:
        return await _value(self._handle.cancel.remote(tenant, generation))

    async def get(self, tenant: TenantId, generation: GenerationId) -> GenerationRecord:
        return await _value(self._handle.get.remote(tenant, generation))

    async def list_generations(self, tenant: TenantId) -> tuple[GenerationRecord, ...]:
        return await _value(self._handle.list_generations.remote(tenant))

    async def count_tokens(self, model: str, chunk: PromptChunk) -> int:
        return await _value(self._handle.count_tokens.remote(model, chunk))

    async def estimate(self, request: GenerationRequest) -> Estimate:
        return await _value(self._handle.estimate.remote(request))

    async def tenant_load(self, tenant: TenantId, limits: TenantLimits) -> TenantLoad:
        return await _value(self._handle.tenant_load.remote(tenant, limits))

    async def list_cache_entries(self, tenant: TenantId) -> tuple[CacheEntry, ...]:
        return await _value(self._handle.list_cache_entries.remote(tenant))

    async def purge_cache_entries(self, tenant: TenantId, wanted: CachePurge) -> CachePurged:
        return await _value(self._handle.purge_cache_entries.remote(tenant, wanted))

    async def apply_shares(self, shares: TenantShares) -> None:
        await _value(self._handle.apply_shares.remote(shares))

    async def status(self) -> BackendStatus:
        return await _value(self._handle.status.remote())

    async def _ask(self, method: str, *arguments: object) -> Any:
        call: Any = getattr(self._handle, method)
        return await _value(call.remote(*arguments))


async def _value(call: Awaitable[T | ErrorRecord]) -> T:
    """Router side: the value of a call, or the refusal raised again."""
    try:
        answer = await call
    except (RayError, RayServeException) as error:
        raise _engine_gone() from error
    if isinstance(answer, ErrorRecord):
        raise from_record(answer)
    return answer


def _engine_gone() -> RankLost:
    # The text of a Ray error names actors and hosts, which are none of a client's business.
    return RankLost(
        "the engine is not there; it is being started again, try later", retry_after_s=5.0
    )
