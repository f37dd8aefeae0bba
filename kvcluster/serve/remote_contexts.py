"""Both ends of the wire between routers and an engine for contexts: see `remote`."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from kvcluster.engine.api import PromptChunk
from kvcluster.engine.context_api import (
    ContextChange,
    ContextRecord,
    ContextRequest,
    OpenedContext,
)
from kvcluster.engine.service import EngineService
from kvcluster.errors import ErrorRecord
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.types import TenantId

T = TypeVar("T")


class RemoteContexts:
    """The router's end: a `ContextBackend`. `_ask` calls the engine's method of a name."""

    async def _ask(self, method: str, *arguments: object) -> Any:
        raise NotImplementedError

    async def open_context(self, request: ContextRequest) -> OpenedContext:
        opened: OpenedContext = await self._ask("open_context", request)
        return opened

    async def append_context(
        self, tenant: TenantId, context_id: str, upload: int, chunk: PromptChunk
    ) -> None:
        await self._ask("append_context", tenant, context_id, upload, chunk)

    async def finish_context(self, tenant: TenantId, context_id: str, upload: int) -> ContextRecord:
        return await self._record("finish_context", tenant, context_id, upload)

    async def get_context(self, tenant: TenantId, context_id: str) -> ContextRecord:
        return await self._record("get_context", tenant, context_id)

    async def list_contexts(self, tenant: TenantId) -> tuple[ContextRecord, ...]:
        records: tuple[ContextRecord, ...] = await self._ask("list_contexts", tenant)
        return records

    async def update_context(
        self,
        tenant: TenantId,
        context_id: str,
        change: ContextChange,
        *,
        etag: str,
        limits: TenantLimits,
    ) -> ContextRecord:
        return await self._record("update_context", tenant, context_id, change, etag, limits)

    async def fork_context(
        self, tenant: TenantId, context_id: str, new_id: str, num_tokens: int, limits: TenantLimits
    ) -> ContextRecord:
        return await self._record("fork_context", tenant, context_id, new_id, num_tokens, limits)

    async def delete_context(self, tenant: TenantId, context_id: str, etag: str) -> None:
        await self._ask("delete_context", tenant, context_id, etag)

    async def _record(self, method: str, *arguments: object) -> ContextRecord:
        record: ContextRecord = await self._ask(method, *arguments)
        return record


class _Answer(Protocol):
    async def __call__(self, call: Callable[[EngineService], Awaitable[T]]) -> T | ErrorRecord: ...


class ReplicaContexts:
    """The engine's end. `_answer` gives the value of a call, or the refusal as a value."""

    _answer: _Answer

    async def open_context(self, request: ContextRequest) -> OpenedContext | ErrorRecord:
        return await self._answer(lambda engine: engine.open_context(request))

    async def append_context(
        self, tenant: TenantId, context_id: str, upload: int, chunk: PromptChunk
    ) -> ErrorRecord | None:
        return await self._answer(
            lambda engine: engine.append_context(tenant, context_id, upload, chunk)
        )

    async def finish_context(
        self, tenant: TenantId, context_id: str, upload: int
    ) -> ContextRecord | ErrorRecord:
        return await self._answer(lambda engine: engine.finish_context(tenant, context_id, upload))

    async def get_context(self, tenant: TenantId, context_id: str) -> ContextRecord | ErrorRecord:
        return await self._answer(lambda engine: engine.get_context(tenant, context_id))

    async def list_contexts(self, tenant: TenantId) -> tuple[ContextRecord, ...] | ErrorRecord:
        return await self._answer(lambda engine: engine.list_contexts(tenant))

    async def update_context(
        self,
        tenant: TenantId,
        context_id: str,
        change: ContextChange,
        etag: str,
        limits: TenantLimits,
    ) -> ContextRecord | ErrorRecord:
        return await self._answer(
            lambda engine: engine.update_context(
                tenant, context_id, change, etag=etag, limits=limits
            )
        )

    async def fork_context(
        self, tenant: TenantId, context_id: str, new_id: str, num_tokens: int, limits: TenantLimits
    ) -> ContextRecord | ErrorRecord:
        return await self._answer(
            lambda engine: engine.fork_context(tenant, context_id, new_id, num_tokens, limits)
        )

    async def delete_context(
        self, tenant: TenantId, context_id: str, etag: str
    ) -> ErrorRecord | None:
        return await self._answer(lambda engine: engine.delete_context(tenant, context_id, etag))
