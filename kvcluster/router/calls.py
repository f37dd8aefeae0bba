"""One gRPC call as the service sees it: its caller, its deadline, its events, its errors.

All errors leave through `_answering_errors`, so that a caller always gets a status with ErrorInfo.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc import aio

from kvcluster.errors import ClientTooSlow, KvClusterError
from kvcluster.log import get_logger
from kvcluster.router.auth import Authenticator, Caller
from kvcluster.router.messages import MessageT, Parsed, parser_of, unwrap
from kvcluster.router.open_calls import OpenCalls
from kvcluster.router.status import DETAILS_KEY, internal_error, is_bug, status_from_error
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.types import TenantId

ResponseT = TypeVar("ResponseT", bound=Message)
Context = aio.ServicerContext[Any, Any]

_log = get_logger(__name__)


class Call:
    """A call whose caller is known. Used by the task that serves it."""

    def __init__(
        self,
        context: Context,
        caller: Caller,
        authenticator: Authenticator,
        *,
        write_timeout_s: float,
    ) -> None:
        self.caller = caller
        self._context = context
        self._authenticator = authenticator
        self._write_timeout_s = write_timeout_s
        self._task: asyncio.Task[None] | None = None
        self._ended_by: KvClusterError | None = None

    @property
    def tenant(self) -> TenantId:
        return self.caller.tenant

    @property
    def peer(self) -> str:
        """Where the call comes from, as gRPC writes it."""
        peer: str = self._context.peer()
        return peer

    @property
    def deadline_s(self) -> float | None:
        """Seconds left for the call; None: no deadline."""
        left_s: float | None = self._context.time_remaining()
        return left_s

    def limits_for_more(self) -> TenantLimits:
        """The tenant's limits, if it may begin a generation now. Raises: CredentialInvalid,
        TenantSuspended, TenantDraining, StoreUnavailable."""
        return self._authenticator.check_takes_more(self.caller)

    def recheck(self) -> None:
        """Raises: why the call is not served any more."""
        self._authenticator.check_served(self.caller)

    async def run(self, serving: Coroutine[Any, Any, None]) -> None:
        """Serve, until that ends or `end_with` is called. Raises: what either says."""
        self._task = asyncio.current_task()
        try:
            await serving
        except asyncio.CancelledError:
            if self._ended_by is None or self._task is None:
                raise
            self._task.uncancel()
            raise self._ended_by from None

    def end_with(self, error: KvClusterError) -> None:
        """End a call that is in `run` with the status of `error`. The first error counts."""
        if self._ended_by is None and self._task is not None:
            self._ended_by = error
            self._task.cancel()

    async def send(self, response: Message) -> None:
        """Write one event. Raises ClientTooSlow when the client takes too long to make room."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._context.write(response)
        except TimeoutError:
            raise ClientTooSlow(
                f"an event was not read within {self._write_timeout_s:g} s: resume the generation "
                "and read faster"
            ) from None


class CallWrapper:
    """Builds grpc's method handlers around plain coroutines of the service."""

    def __init__(
        self,
        authenticator: Authenticator,
        open_calls: OpenCalls,
        *,
        max_message_bytes: int,
        max_unary_calls: int,
        write_timeout_s: float,
    ) -> None:
        """`open_calls`: the streams; `max_unary_calls`: of one tenant at a time."""
        self._authenticator = authenticator
        self._open_calls = open_calls
        self._unary_calls = OpenCalls("unary_calls")
        self._max_unary_calls = max_unary_calls
        self._max_message_bytes = max_message_bytes
        self._write_timeout_s = write_timeout_s

    def unary(
        self, kind: type[MessageT], serve: Callable[[MessageT, Call], Awaitable[ResponseT]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def answer(parsed: Parsed[MessageT], context: Context) -> ResponseT | None:
            async with _answering_errors(context):
                call, _ = self._authenticate(context)
                # A tenant that has all its streams open can still cancel one.
                with self._unary_calls.holding(call, self._max_unary_calls):
                    return await serve(unwrap(parsed), call)
            return None

        return grpc.unary_unary_rpc_method_handler(answer, self._parser(kind), _serialize)

    def server_stream(
        self, kind: type[MessageT], serve: Callable[[MessageT, Call], Coroutine[Any, Any, None]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def answer(parsed: Parsed[MessageT], context: Context) -> None:
            async with _answering_errors(context), self._held(context) as call:
                await call.run(serve(unwrap(parsed), call))

        return grpc.unary_stream_rpc_method_handler(answer, self._parser(kind), _serialize)

    def client_stream(
        self,
        kind: type[MessageT],
        serve: Callable[[AsyncIterator[Parsed[MessageT]], Call], Awaitable[ResponseT]],
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def answer(
            parsed: AsyncIterator[Parsed[MessageT]], context: Context
        ) -> ResponseT | None:
            answers: list[ResponseT] = []

            async def serving(call: Call) -> None:
                answers.append(await serve(aiter(parsed), call))

            async with _answering_errors(context), self._held(context) as call:
                await call.run(serving(call))
            return answers[0] if answers else None

        return grpc.stream_unary_rpc_method_handler(answer, self._parser(kind), _serialize)

    def two_way_stream(
        self,
        kind: type[MessageT],
        serve: Callable[[AsyncIterator[Parsed[MessageT]], Call], Coroutine[Any, Any, None]],
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def answer(parsed: AsyncIterator[Parsed[MessageT]], context: Context) -> None:
            async with _answering_errors(context), self._held(context) as call:
                await call.run(serve(aiter(parsed), call))

        return grpc.stream_stream_rpc_method_handler(answer, self._parser(kind), _serialize)

    def _authenticate(self, context: Context) -> tuple[Call, TenantLimits]:
        caller = self._authenticator.authenticate(context.invocation_metadata() or ())
        limits = self._authenticator.check_served(caller)
        call = Call(context, caller, self._authenticator, write_timeout_s=self._write_timeout_s)
        return call, limits

    @asynccontextmanager
    async def _held(self, context: Context) -> AsyncIterator[Call]:
        """The call, counted among the open ones of its tenant."""
        call, limits = self._authenticate(context)
        with self._open_calls.holding(call, limits.open_streams):
            yield call

    def _parser(self, kind: type[MessageT]) -> Callable[[bytes], Parsed[MessageT]]:
        return parser_of(kind, max_bytes=self._max_message_bytes)


@asynccontextmanager
async def _answering_errors(context: Context) -> AsyncIterator[None]:
    """End the call with the status of whatever is raised inside."""
    try:
        yield
    except aio.BaseError:
        raise  # the call is already over: nobody is left to answer
    except KvClusterError as error:
        if is_bug(error):
            await _abort(context, _logged(error))
        await _abort(context, error)
    except Exception as error:  # noqa: BLE001  grpc would send its text, internals and all
        await _abort(context, _logged(error))


def _logged(error: Exception) -> KvClusterError:
    trace_id = secrets.randbits(48)
    _log.error("call_failed", trace_id=trace_id, exc_info=error)
    return internal_error(trace_id)


async def _abort(context: Context, error: KvClusterError) -> None:
    status = status_from_error(error)
    codes = {code.value[0]: code for code in grpc.StatusCode}
    await context.abort(
        codes[status.code], status.message, ((DETAILS_KEY, status.SerializeToString()),)
    )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
