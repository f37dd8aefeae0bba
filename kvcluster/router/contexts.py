"""`ContextService`: every RPC as one coroutine from message to message. Knows no gRPC."""

from collections.abc import AsyncIterator

from google.protobuf.empty_pb2 import Empty

from kvcluster.engine.api import Backend
from kvcluster.engine.context_api import ContextRecord
from kvcluster.errors import ContextNotFound
from kvcluster.router import names, paging
from kvcluster.router.calls import Call
from kvcluster.router.context_records import (
    change_from_proto,
    context_to_proto,
    setup_from_proto,
)
from kvcluster.router.context_upload import ContextUpload
from kvcluster.router.messages import Parsed
from kvcluster.router.routing import Routes
from kvcluster.rpc.v1 import context_service_pb2 as pb
from kvcluster.tenancy.filters import conditions_in, matches
from kvcluster.types import TenantId

_FIELDS = ("state", "display_name", "pinned", "policy", "model")


class ContextService:
    """Serves the backends of `routes`. A context lives in the engine that took its upload."""

    def __init__(self, routes: Routes, *, upload_idle_timeout_s: float) -> None:
        self._routes = routes
        self._upload_idle_timeout_s = upload_idle_timeout_s

    async def upload(
        self, messages: AsyncIterator[Parsed[pb.UploadContextRequest]], call: Call
    ) -> pb.Context:
        upload = ContextUpload(messages, idle_timeout_s=self._upload_idle_timeout_s)
        setup = await upload.setup()
        request = setup_from_proto(setup, call.tenant, call.limits_for_more())
        try:
            backend = await _backend_with(self._routes, call.tenant, request.context_id)
        except ContextNotFound:
            backend = (await self._routes.resolve(request.model)).backend
        opened = await backend.open_context(request)
        # The next message is read only when the engine has taken this one.
        async for chunk in upload.chunks():
            await backend.append_context(call.tenant, request.context_id, opened.upload, chunk)
        done = await backend.finish_context(call.tenant, request.context_id, opened.upload)
        return context_to_proto(done)

    async def get(self, message: pb.GetContextRequest, call: Call) -> pb.Context:
        context_id = names.context_of(message.name, call.tenant)
        backend = await backend_of_context(self._routes, call.tenant, context_id)
        return context_to_proto(await backend.get_context(call.tenant, context_id))

    async def list(self, message: pb.ListContextsRequest, call: Call) -> pb.ListContextsResponse:
        names.check_parent(message.parent, call.tenant)
        conditions = conditions_in(message.filter, _FIELDS)
        records = [
            record
            for backend in self._routes.backends
            for record in await backend.list_contexts(call.tenant)
            if matches(conditions, lambda field, record=record: _value_in(record, field))  # type: ignore[misc]
        ]
        page = paging.page_of(
            records,
            key=lambda record: record.context_id,
            page_size=message.page_size,
            page_token=message.page_token,
        )
        return pb.ListContextsResponse(
            contexts=[context_to_proto(record) for record in page.items],
            next_page_token=page.next_token,
        )

    async def update(self, message: pb.UpdateContextRequest, call: Call) -> pb.Context:
        context_id = names.context_of(message.context.name, call.tenant, field="context.name")
        mask = message.update_mask if message.HasField("update_mask") else None
        change = change_from_proto(message.context, mask)
        backend = await backend_of_context(self._routes, call.tenant, context_id)
        record = await backend.update_context(
            call.tenant,
            context_id,
            change,
            etag=message.context.etag,
            limits=call.limits_for_more(),
        )
        return context_to_proto(record)

    async def fork(self, message: pb.ForkContextRequest, call: Call) -> pb.Context:
        context_id = names.context_of(message.name, call.tenant)
        new_id = names.checked_context_id(message.context_id, "context_id")
        backend = await backend_of_context(self._routes, call.tenant, context_id)
        record = await backend.fork_context(
            call.tenant, context_id, new_id, message.prefix_tokens, call.limits_for_more()
        )
        return context_to_proto(record)

    async def delete(self, message: pb.DeleteContextRequest, call: Call) -> Empty:
        context_id = names.context_of(message.name, call.tenant)
        backend = await backend_of_context(self._routes, call.tenant, context_id)
        await backend.delete_context(call.tenant, context_id, message.etag)
        return Empty()


async def backend_of_context(routes: Routes, tenant: TenantId, context_id: str) -> Backend:
    """The engine that has a context: the only one there is, whether it has it or not. Raises:
    ContextNotFound."""
    if len(routes.backends) == 1:
        # It says so itself. Asking first would have it look at every block of the context.
        return routes.backends[0]
    return await _backend_with(routes, tenant, context_id)


async def _backend_with(routes: Routes, tenant: TenantId, context_id: str) -> Backend:
    for backend in routes.backends:
        try:
            await backend.get_context(tenant, context_id)
        except ContextNotFound:
            continue
        return backend
    raise names.context_not_found()


def _value_in(record: ContextRecord, field: str) -> str:
    if field == "state":
        return record.state.name
    if field == "pinned":
        return "true" if record.pinned else "false"
    value: str = getattr(record, field)
    return value
