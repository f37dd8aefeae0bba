"""`InferenceService`: every RPC as one coroutine from message to message.

Knows no gRPC: `calls` builds the method handlers, ends calls with a status and sends events.
"""

from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec

from kvcluster.engine.api import (
    Backend,
    GenerationRecord,
    GenerationRequest,
    GenerationState,
    PromptChunk,
)
from kvcluster.errors import GenerationNotFound, InvalidField
from kvcluster.router import names, paging
from kvcluster.router.calls import Call
from kvcluster.router.contexts import backend_of_context
from kvcluster.router.convert import part_from_proto, request_from_proto
from kvcluster.router.generating import Generating, follow, raise_if_failed
from kvcluster.router.messages import Parsed
from kvcluster.router.policy import fault_in_parts, policy_from_proto
from kvcluster.router.records import estimate_to_proto, model_to_proto, record_to_proto
from kvcluster.router.routing import Routes
from kvcluster.router.upload import Upload
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.types import TenantId

_MAX_TIME_NS = 1 << 63


class InferenceService:
    """Serves the backends of `routes`. Holds no request: those live in the engine."""

    def __init__(self, routes: Routes, *, upload_idle_timeout_s: float) -> None:
        self._routes = routes
        self._upload_idle_timeout_s = upload_idle_timeout_s
        self._generating = Generating()

    async def generate(self, message: pb.GenerateRequest, call: Call) -> None:
        part = part_from_proto(message.prompt, field="prompt")
        await self._generate(message, call, _only(part.chunk))

    async def stream_generate(
        self, messages: AsyncIterator[Parsed[pb.StreamGenerateRequest]], call: Call
    ) -> None:
        upload = Upload(messages, idle_timeout_s=self._upload_idle_timeout_s)
        await self._generate(await upload.setup(), call, upload.chunks())

    async def resume_generation(self, message: pb.ResumeGenerationRequest, call: Call) -> None:
        found = await self._find(message.name, call.tenant)
        generation = found.record.generation
        raise_if_failed(await follow(call, found.backend, generation, message.after_sequence))

    async def get_generation(self, message: pb.GetGenerationRequest, call: Call) -> pb.Generation:
        found = await self._find(message.name, call.tenant)
        return record_to_proto(found.record)

    async def cancel_generation(
        self, message: pb.CancelGenerationRequest, call: Call
    ) -> pb.Generation:
        found = await self._find(message.name, call.tenant)
        record = await found.backend.cancel(call.tenant, found.record.generation)
        return record_to_proto(record)

    async def list_generations(
        self, message: pb.ListGenerationsRequest, call: Call
    ) -> pb.ListGenerationsResponse:
        names.check_parent(message.parent, call.tenant)
        state = _state_in(message.filter)
        records = [
            record
            for backend in self._routes.backends
            for record in await backend.list_generations(call.tenant)
            if state in (None, record.state)
        ]
        page = paging.page_of(
            records,
            key=_newest_first,
            page_size=message.page_size,
            page_token=message.page_token,
        )
        return pb.ListGenerationsResponse(
            generations=[record_to_proto(record) for record in page.items],
            next_page_token=page.next_token,
        )

    async def count_tokens(
        self, message: pb.CountTokensRequest, _call: Call
    ) -> pb.CountTokensResponse:
        part = part_from_proto(message.input, field="input")
        route = await self._routes.resolve(message.model)
        tokens = await route.backend.count_tokens(route.model, part.chunk)
        return pb.CountTokensResponse(tokens=tokens)

    async def estimate_generation(
        self, message: pb.EstimateGenerationRequest, call: Call
    ) -> pb.EstimateGenerationResponse:
        route = await self._routes.resolve(message.model)
        request = GenerationRequest(
            tenant=call.tenant,
            model=route.model,
            max_output_tokens=message.max_output_tokens,
            policy=policy_from_proto(message),
            input_tokens=message.input_tokens,
            limits=call.limits_for_more(),
        )
        estimate = await route.backend.estimate(request)
        fault = fault_in_parts(estimate.message, message)
        if fault is not None:
            estimate = msgspec.structs.replace(estimate, message=": ".join(fault))
        return estimate_to_proto(estimate)

    async def list_models(
        self, message: pb.ListModelsRequest, _call: Call
    ) -> pb.ListModelsResponse:
        page = paging.page_of(
            await self._routes.models(),
            key=lambda status: status.model.name,
            page_size=message.page_size,
            page_token=message.page_token,
        )
        return pb.ListModelsResponse(
            models=[model_to_proto(status) for status in page.items],
            next_page_token=page.next_token,
        )

    async def _generate(
        self, message: pb.GenerateRequest, call: Call, prompt: AsyncIterator[PromptChunk]
    ) -> None:
        route = await self._routes.resolve(message.model, request_id=message.request_id)
        request = request_from_proto(
            message, tenant=call.tenant, model=route.model, deadline_s=call.deadline_s
        )
        backend = route.backend
        if request.context:
            backend = await backend_of_context(self._routes, call.tenant, request.context)
        # Only now: the setup of an upload may have been a long time coming.
        request = msgspec.structs.replace(request, limits=call.limits_for_more())
        try:
            await self._generating.run(call, backend, request, prompt)
        except InvalidField as error:
            fault = fault_in_parts(error.message, message)
            if fault is None:
                raise
            raise InvalidField(*fault) from error

    async def _find(self, name: str, tenant: TenantId) -> "_Found":
        """The generation called `name`. Raises InvalidField, GenerationNotFound."""
        generation = names.generation_of(name, tenant)
        for backend in self._routes.backends:
            try:
                return _Found(backend, await backend.get(tenant, generation))
            except GenerationNotFound:
                continue
        raise names.generation_not_found()


class _Found(NamedTuple):
    backend: Backend
    record: GenerationRecord


async def _only(chunk: PromptChunk) -> AsyncIterator[PromptChunk]:
    yield chunk


def _newest_first(record: GenerationRecord) -> str:
    return f"{_MAX_TIME_NS - round(record.create_time_s * 1e9):020d}/{record.generation}"


def _state_in(filter_text: str) -> GenerationState | None:
    """The state that `state=NAME` asks for; None: all. Raises InvalidField for another filter."""
    if not filter_text:
        return None
    key, _, value = filter_text.partition("=")
    states = {state.name: state for state in GenerationState}
    if key.strip() != "state" or value.strip() not in states:
        raise InvalidField("filter", f"want empty or state=NAME with one of {', '.join(states)}")
    return states[value.strip()]
