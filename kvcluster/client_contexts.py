"""The calls of a client about contexts. Records are those of `engine.context_api`; in them
`context_id` is the resource name, which every call takes beside the id alone.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, TypedDict, TypeVar, Unpack

import msgspec
from grpc import aio

from kvcluster.engine.api import TextChunk
from kvcluster.engine.context_api import ContextChange, ContextRecord, ContextRequest, ContextState
from kvcluster.errors import ContextNotFound, InvalidField, KvClusterError
from kvcluster.router import context_records, convert, names
from kvcluster.router.convert import BYTES_PER_ID
from kvcluster.router.prompt import Prompt, PromptIds, num_tokens_in, parts_of
from kvcluster.rpc.v1 import context_service_pb2 as pb
from kvcluster.rpc.v1.context_service_pb2_grpc import ContextServiceStub
from kvcluster.types import DEFAULT_TENANT, TenantId

_PAGE_SIZE = 1000

ReplyT = TypeVar("ReplyT")


class ContextOptions(TypedDict, total=False):
    """What a new context is like."""

    model: str
    """Left out: the only model that is served."""
    policy: str
    """How its blocks are compressed; left out: the server's default."""
    display_name: str
    ttl_s: float | None
    """Deleted so long after now; left out: never."""
    pinned: bool
    """Never given up for others."""
    durable: bool
    """Return when it is on disk."""
    tenant: TenantId
    """Our own: the one of the API key."""


class ContextCalls:
    """What `Client` can do with contexts."""

    def __init__(
        self,
        channel: aio.Channel,
        metadata: tuple[tuple[str, str], ...],
        typed_errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`typed_errors`: turns a call's status into our error."""
        self._contexts = ContextServiceStub(channel)
        self._context_metadata = metadata
        self._typed_errors = typed_errors

    async def upload_context(
        self,
        context_id: str,
        *,
        prompt: Prompt | None = None,
        prompt_ids: PromptIds | None = None,
        **options: Unpack[ContextOptions],
    ) -> ContextRecord:
        """Upload a context, or go on with an upload that broke: what came before is not sent again,
        and must be the same. Returns when all of it is computed."""
        request = msgspec.convert({"context_id": context_id, **options}, ContextRequest)
        received = await self._received(request)
        if received is not None and received.state is not ContextState.CREATING:
            received = None
        return await self._upload(request, prompt, prompt_ids, received, is_continued=False)

    async def append_context(
        self,
        context: str,
        *,
        prompt: Prompt | None = None,
        prompt_ids: PromptIds | None = None,
        durable: bool = False,
        tenant: TenantId = DEFAULT_TENANT,
    ) -> ContextRecord:
        """Put more tokens, or text, after a context. Returns when they are computed; `durable`:
        when all of it is on disk."""
        record = await self.get_context(context, tenant=tenant)
        request = ContextRequest(
            tenant=tenant, context_id=record.context_id.split("/")[-1], durable=durable
        )
        return await self._upload(request, prompt, prompt_ids, record, is_continued=True)

    async def get_context(
        self, context: str, *, tenant: TenantId = DEFAULT_TENANT
    ) -> ContextRecord:
        message = pb.GetContextRequest(name=context_name(context, tenant))
        return await self._record(
            self._contexts.GetContext(message, metadata=self._context_metadata)
        )

    async def list_contexts(
        self, *, filter_text: str = "", tenant: TenantId = DEFAULT_TENANT
    ) -> AsyncIterator[ContextRecord]:
        """Yield the tenant's contexts by id, page by page."""
        message = pb.ListContextsRequest(
            parent=names.tenant_name(tenant), page_size=_PAGE_SIZE, filter=filter_text
        )
        while True:
            call = self._contexts.ListContexts(message, metadata=self._context_metadata)
            page = await self._answer(call)
            for context in page.contexts:
                yield context_records.context_from_proto(context)
            if not page.next_page_token:
                return
            message.page_token = page.next_page_token

    async def update_context(
        self,
        context: str,
        change: ContextChange,
        *,
        etag: str = "",
        tenant: TenantId = DEFAULT_TENANT,
    ) -> ContextRecord:
        message = context_records.update_to_proto(context_name(context, tenant), change, etag)
        call = self._contexts.UpdateContext(message, metadata=self._context_metadata)
        return await self._record(call)

    async def fork_context(
        self,
        context: str,
        new_id: str,
        *,
        prefix_tokens: int = 0,
        tenant: TenantId = DEFAULT_TENANT,
    ) -> ContextRecord:
        """A context that begins with another's tokens (0: all of them) and shares its blocks."""
        if not 0 <= prefix_tokens < 1 << 64:
            raise InvalidField("prefix_tokens", f"want 0 or more, got {prefix_tokens}")
        message = pb.ForkContextRequest(
            name=context_name(context, tenant), context_id=new_id, prefix_tokens=prefix_tokens
        )
        return await self._record(
            self._contexts.ForkContext(message, metadata=self._context_metadata)
        )

    async def delete_context(
        self, context: str, *, etag: str = "", tenant: TenantId = DEFAULT_TENANT
    ) -> None:
        """Returns when its blocks are zeroed on the ranks, and its files are gone."""
        message = pb.DeleteContextRequest(name=context_name(context, tenant), etag=etag)
        await self._answer(self._contexts.DeleteContext(message, metadata=self._context_metadata))

    async def _received(self, request: ContextRequest) -> ContextRecord | None:
        try:
            return await self.get_context(request.context_id, tenant=request.tenant)
        except ContextNotFound:
            return None

    async def _upload(
        self,
        request: ContextRequest,
        prompt: Prompt | None,
        prompt_ids: PromptIds | None,
        received: ContextRecord | None,
        *,
        is_continued: bool,
    ) -> ContextRecord:
        start = 0
        if received is not None:
            start = received.received_bytes if prompt is not None else received.received_tokens
        num_new = num_tokens_in(prompt_ids)
        if num_new is not None:
            total = num_new + (start if is_continued else 0)
            request = msgspec.structs.replace(request, total_tokens=total)
        messages = _messages(request, prompt, prompt_ids, start, is_continued=is_continued)
        wrong: list[KvClusterError] = []
        call = self._contexts.UploadContext(
            _noting(messages, wrong), metadata=self._context_metadata
        )
        try:
            return await self._record(call)
        except KvClusterError as error:
            # grpc says of what was wrong with a message only that the call broke.
            raise (wrong or [error])[0] from None
        finally:
            call.cancel()

    async def _record(self, call: Awaitable[pb.Context]) -> ContextRecord:
        return context_records.context_from_proto(await self._answer(call))

    async def _answer(self, call: Awaitable[ReplyT]) -> ReplyT:
        with self._typed_errors():
            return await call


def context_name(context: str, tenant: TenantId = DEFAULT_TENANT) -> str:
    """The resource name of an id; a name stays as it is."""
    return context if "/" in context else names.context_name(tenant, context)


async def _messages(
    request: ContextRequest,
    prompt: Prompt | None,
    prompt_ids: PromptIds | None,
    start: int,
    *,
    is_continued: bool,
) -> AsyncIterator[Any]:
    yield pb.UploadContextRequest(setup=context_records.setup_to_proto(request))
    async for part in parts_of(prompt, prompt_ids):
        if is_continued:
            chunk = msgspec.structs.replace(part.chunk, offset=part.chunk.offset + start)
            moved = part._replace(chunk=chunk)
        elif part.end <= start:
            continue
        else:
            moved = _beyond(part, start)
        yield pb.UploadContextRequest(chunk=convert.part_to_proto(moved))
        # The call's task takes messages as fast as it gets them; let others run.
        await asyncio.sleep(0)


async def _noting(messages: AsyncIterator[Any], wrong: list[KvClusterError]) -> AsyncIterator[Any]:
    """The same messages; what they raise is added to `wrong`."""
    try:
        async for message in messages:
            yield message
    except KvClusterError as error:
        wrong.append(error)
        raise


def _beyond(part: convert.PromptPart, start: int) -> convert.PromptPart:
    """What of a part lies at `start` or after."""
    if part.chunk.offset >= start:
        return part
    skipped = start - part.chunk.offset
    if isinstance(part.chunk, TextChunk):
        return convert.text_part(start, part.raw[skipped:].decode())
    return convert.token_part(start, part.raw[skipped * BYTES_PER_ID :], field="prompt_ids")
