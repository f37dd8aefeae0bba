"""One gRPC call as the service sees it: its tenant, its deadline, its events, its errors.

All errors leave through `_answering_errors`, so that a caller always gets a status with ErrorInfo.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc import aio

from kvcluster.errors import ClientTooSlow, KvClusterError
from kvcluster.log import get_logger
from kvcluster.router.auth import Authenticator
from kvcluster.router.messages import MessageT, Parsed, parser_of, unwrap
from kvcluster.router.status import DETAILS_KEY, internal_error, is_bug, status_from_error
from kvcluster.rpc.v1.inference_service_pb2 import GenerateResponse
from kvcluster.types import TenantId

ResponseT = TypeVar("ResponseT", bound=Message)
Context = aio.ServicerContext[Any, Any]

_log = get_logger(__name__)


class Call:
    """A call whose tenant is known. Used by the task that serves it."""

    def __init__(self, context: Context, tenant: TenantId, *, write_timeout_s: float) -> None:
        self.tenant = tenant
        self._context = context
        self._write_timeout_s = write_timeout_s

    @property
    def deadline_s(self) -> float | None:
        """Seconds left for the call; None: no deadline."""
        left_s: float | None = self._context.time_remaining()
        return left_s

    async def send(self, response: GenerateResponse) -> None:
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
        self, authenticator: Authenticator, *, max_message_bytes: int, write_timeout_s: float
    ) -> None:
        self._authenticator = authenticator
        self._max_message_bytes = max_message_bytes
        self._write_timeout_s = write_timeout_s

    def unary(
        self, kind: type[MessageT], serve: Callable[[MessageT, Call], Awaitable[ResponseT]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def answer(parsed: Parsed[MessageT], context: Context) -> ResponseT | None:
            async with _answering_errors(context):
                call = self._authenticate(context)
                return await serve(unwrap(parsed), call)
            return None

        return grpc.unary_unary_rpc_method_handler(answer, self._parser(kind), _serialize)

    def server_stream(
        self, kind: type[MessageT], serve: Callable[[MessageT, Call], Awaitable[None]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def answer(parsed: Parsed[MessageT], context: Context) -> None:
            async with _answering_errors(context):
                call = self._authenticate(context)
                await serve(unwrap(parsed), call)

        return grpc.unary_stream_rpc_method_handler(answer, self._parser(kind), _serialize)

    def two_way_stream(
        self,
        kind: type[MessageT],
        serve: Callable[[AsyncIterator[Parsed[MessageT]], Call], Awaitable[None]],
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def answer(parsed: AsyncIterator[Parsed[MessageT]], context: Context) -> None:
            async with _answering_errors(context):
                await serve(aiter(parsed), self._authenticate(context))

        return grpc.stream_stream_rpc_method_handler(answer, self._parser(kind), _serialize)

    def _authenticate(self, context: Context) -> Call:
        tenant = self._authenticator.authenticate(context.invocation_metadata() or ())
        return Call(context, tenant, write_timeout_s=self._write_timeout_s)

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
