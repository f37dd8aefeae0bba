"""The asyncio client: all that a user of a running cluster imports.

Events and records are those of `engine.api`; in them `generation` is the resource name, which
`resume`, `get` and `cancel` take. Every failure is an error of `kvcluster.errors`.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypedDict, TypeVar, Unpack

import msgspec
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from kvcluster.client_contexts import ContextCalls, context_name
from kvcluster.client_tls import ClientTls, open_channel
from kvcluster.engine.api import (
    Estimate,
    GenerationEvent,
    GenerationRecord,
    GenerationRequest,
    GenerationState,
)
from kvcluster.errors import InvalidField, ServerUnavailable
from kvcluster.router import convert, names, records
from kvcluster.router.prompt import (
    Prompt,
    PromptIds,
    TokenIds,
    num_tokens_in,
    parts_of,
    whole,
)
from kvcluster.router.sent_status import SentStatus
from kvcluster.router.status import error_from_rpc
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from kvcluster.types import DEFAULT_TENANT, TenantId

DEFAULT_MAX_OUTPUT_TOKENS = 256
_PAGE_SIZE = 1000
_KEEPALIVE_MS = 20_000
_CHANNEL_OPTIONS = (
    # A server that is gone without a word is noticed within a minute, also during a long prefill.
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.max_pings_without_data", 0),
)

ReplyT = TypeVar("ReplyT")
_UploadCall = aio.StreamStreamCall[pb.StreamGenerateRequest, pb.GenerateResponse]


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen; see `types.SamplingParams` for each. Left out: greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    logprobs: int | None
    prompt_logprobs: int | None
    min_output_tokens: int
    ignore_eos: bool
    logit_bias: tuple[tuple[int, float], ...]


_SAMPLING_OPTIONS = SamplingOptions.__annotations__.keys()


class GenerateOptions(SamplingOptions, total=False):
    """How one generation runs."""

    model: str
    """Left out: the only model that is served."""
    policy: str
    """How the cache is compressed, in the policy language: `int4`, `auto: ppl<=1%`; `models` tells
    what there is. Left out: the server's default."""
    max_output_tokens: int
    request_id: str
    """Idempotency key: a second call with it attaches to the first one's generation."""
    input_tokens: int | None
    """Length of the prompt, if known: a prompt over the limit is then refused before the upload.
    Taken from `prompt_ids` where that is not streamed."""
    disconnect_grace_s: float
    """How long the generation goes on without us, so that `resume` can pick it up."""
    progress_interval_s: float
    priority: int
    context: str
    """Id or name of a context that comes before the prompt. Left out: none."""
    cache_mode: str
    """What is done with blocks of earlier requests: read_write, read_only or bypass."""
    cache_namespace: str
    """Blocks are shared within a namespace only."""
    timeout_s: float | None
    """The generation ends this many seconds from now at the latest."""


class Client(ContextCalls):
    """A connection to one server. An async context manager; opens at the first call.

    Methods raise the error that the server answered with, ServerUnavailable when there is no
    server, and DeadlineExceeded.
    """

    def __init__(
        self, address: str, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        """`api_key`: the secret of a key, or a token of the server's identity provider. `tls`: None
        connects unencrypted. Raises: ConfigError for certificates that cannot be used."""
        self._channel = open_channel(address, tls, _CHANNEL_OPTIONS)
        self._stub = InferenceServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        super().__init__(self._channel, self._metadata, _typed_errors)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Break off running calls and close the connection."""
        await self._channel.close()

    async def generate(
        self,
        *,
        prompt: Prompt | None = None,
        prompt_ids: PromptIds | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[GenerationEvent]:
        """Upload the prompt and yield the events, from Admitted to Finished.

        The prompt may be an iterator: it is then read no faster than the server takes it. Stopping
        the iteration cancels the call. After a Finished that is an error, that error is raised.
        """
        timeout_s = options.pop("timeout_s", None)
        if options.get("context"):
            options["context"] = context_name(options["context"])
        request = _request_of(options, prompt_ids)
        setup = pb.StreamGenerateRequest(setup=convert.request_to_proto(request))
        call = self._stub.StreamGenerate(timeout=timeout_s, metadata=self._metadata)
        sending = asyncio.create_task(_send(call, _messages(setup, prompt, prompt_ids)))
        try:
            async for event in _events(_upload_events(call)):
                yield event
        except ServerUnavailable:
            # A prompt that cannot be read breaks off the call; that error is the one to report.
            if sending.done() and not sending.cancelled() and (error := sending.exception()):
                raise error from None
            raise
        finally:
            call.cancel()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def resume(
        self, name: str, *, after_sequence: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[GenerationEvent]:
        """Yield the events of a generation after `after_sequence`, up to Finished."""
        message = pb.ResumeGenerationRequest(name=name, after_sequence=after_sequence)
        call = self._stub.ResumeGeneration(message, timeout=timeout_s, metadata=self._metadata)
        try:
            async for event in _events(call):
                yield event
        finally:
            call.cancel()

    async def get(self, name: str) -> GenerationRecord:
        message = pb.GetGenerationRequest(name=name)
        call = self._stub.GetGeneration(message, metadata=self._metadata)
        return records.record_from_proto(await _reply(call))

    async def cancel(self, name: str) -> GenerationRecord:
        """End a generation. What it had become, if it had ended already."""
        message = pb.CancelGenerationRequest(name=name)
        call = self._stub.CancelGeneration(message, metadata=self._metadata)
        return records.record_from_proto(await _reply(call))

    async def list(
        self, *, state: GenerationState | None = None, tenant: TenantId = DEFAULT_TENANT
    ) -> AsyncIterator[GenerationRecord]:
        """Yield the tenant's generations, newest first, page by page."""
        message = pb.ListGenerationsRequest(
            parent=names.tenant_name(tenant),
            page_size=_PAGE_SIZE,
            filter=f"state={state.name}" if state else "",
        )
        while True:
            page = await _reply(self._stub.ListGenerations(message, metadata=self._metadata))
            for generation in page.generations:
                yield records.record_from_proto(generation)
            if not page.next_page_token:
                return
            message.page_token = page.next_page_token

    async def count_tokens(
        self, *, prompt: str | None = None, prompt_ids: TokenIds | None = None, model: str = ""
    ) -> int:
        """Tokens of a prompt that fits one message."""
        message = pb.CountTokensRequest(
            model=model, input=convert.input_to_proto(whole(prompt, prompt_ids))
        )
        reply = await _reply(self._stub.CountTokens(message, metadata=self._metadata))
        return reply.tokens

    async def estimate(
        self,
        *,
        input_tokens: int,
        max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS,
        model: str = "",
        policy: str = "",
    ) -> Estimate:
        """What admission would say to such a request now."""
        message = pb.EstimateGenerationRequest(
            model=model,
            input_tokens=input_tokens,
            max_output_tokens=max_output_tokens,
            policy=policy,
        )
        call = self._stub.EstimateGeneration(message, metadata=self._metadata)
        return records.estimate_from_proto(await _reply(call))

    async def models(self) -> tuple[records.ServedModel, ...]:
        message = pb.ListModelsRequest(page_size=_PAGE_SIZE)
        reply = await _reply(self._stub.ListModels(message, metadata=self._metadata))
        return tuple(records.model_from_proto(model) for model in reply.models)

    async def health(self) -> bool:
        """Whether the server is ready: a token has been generated through its whole ring."""
        reply = await _reply(self._health.Check(health_pb2.HealthCheckRequest()))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _request_of(options: GenerateOptions, prompt_ids: PromptIds | None) -> GenerationRequest:
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"generate() has no option {', '.join(sorted(unknown))}")
    sampling = {key: value for key, value in options.items() if key in _SAMPLING_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in _SAMPLING_OPTIONS}
    defaults = {
        "model": "",
        "max_output_tokens": DEFAULT_MAX_OUTPUT_TOKENS,
        "input_tokens": num_tokens_in(prompt_ids),
    }
    try:
        return msgspec.convert({**defaults, **rest, "sampling": sampling}, GenerationRequest)
    except msgspec.ValidationError as error:
        raise InvalidField("options", str(error)) from error


async def _messages(
    setup: pb.StreamGenerateRequest, prompt: Prompt | None, prompt_ids: PromptIds | None
) -> AsyncIterator[pb.StreamGenerateRequest]:
    yield setup
    async for part in parts_of(prompt, prompt_ids):
        yield pb.StreamGenerateRequest(chunk=convert.part_to_proto(part))


async def _send(call: _UploadCall, messages: AsyncIterator[pb.StreamGenerateRequest]) -> None:
    try:
        async for message in messages:
            if not await _wrote(call.write(message)):
                return
    except BaseException:
        call.cancel()
        raise
    await _wrote(call.done_writing())


async def _wrote(writing: Awaitable[None]) -> bool:
    """False when the call is over: its status says why, and the reader of events reports it."""
    try:
        await writing
    except (aio.BaseError, aio.AioRpcError, asyncio.InvalidStateError):
        return False
    return True


async def _events(call: AsyncIterable[pb.GenerateResponse]) -> AsyncIterator[GenerationEvent]:
    with _typed_errors():
        async for response in call:
            event = records.event_from_proto(response)
            if event is not None:
                yield event


async def _upload_events(call: _UploadCall) -> AsyncIterator[pb.GenerateResponse]:
    sent = SentStatus(call)
    try:
        async for response in call:
            yield response
    except aio.AioRpcError as error:
        corrected = sent.correct(error)
        if corrected is not None:
            raise corrected from error


async def _reply(call: Awaitable[ReplyT]) -> ReplyT:
    with _typed_errors():
        return await call


@contextmanager
def _typed_errors() -> Iterator[None]:
    """Turn a call's status into our error."""
    try:
        yield
    except aio.AioRpcError as error:
        metadata = error.trailing_metadata()
        raise error_from_rpc(error.code(), error.details() or "", metadata) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Not this task was cancelled but the call: by a server that stopped, or by `close`.
        raise ServerUnavailable("the call was broken off: try again, or resume it") from None
