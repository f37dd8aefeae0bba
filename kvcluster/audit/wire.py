"""Calls as an attacker makes them: any bytes, any metadata, and the status exactly as it came."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import aio

from kvcluster.errors import ServerUnavailable
from kvcluster.router.sent_status import SentStatus
from kvcluster.router.status import DETAILS_KEY
from kvcluster.rpc import v1

Metadata = tuple[tuple[str, str | bytes], ...]
TIMEOUT_S = 20.0
_ADMIN_SERVICES = frozenset({"TenantService", "ClusterService"})


class Answer(NamedTuple):
    """How a call ended, or its first message."""

    code: grpc.StatusCode
    reason: str
    """Of ErrorInfo; empty: it came without."""
    status: bytes
    """All that the status says, to be compared byte by byte."""
    reply: bytes
    """Empty for an error."""
    took_s: float

    @property
    def is_answered(self) -> bool:
        return self.code is grpc.StatusCode.OK

    @property
    def is_unauthenticated(self) -> bool:
        return self.code is grpc.StatusCode.UNAUTHENTICATED


def services() -> tuple[ServiceDescriptor, ...]:
    """Every service of the protos that this version knows."""
    names = sorted(found.name for found in iter_modules(v1.__path__))
    modules = [
        import_module(f"{v1.__name__}.{name}") for name in names if name.endswith("_service_pb2")
    ]
    return tuple(
        service for module in modules for service in module.DESCRIPTOR.services_by_name.values()
    )


def is_admin(service: ServiceDescriptor) -> bool:
    """Whether it is served on the admin port."""
    return service.name in _ADMIN_SERVICES


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def bearer(secret: str) -> Metadata:
    return (("authorization", f"Bearer {secret}"),)


async def ask(
    channel: aio.Channel,
    method: MethodDescriptor,
    request: bytes,
    metadata: Metadata = (),
    *,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """Send one message and take one, whatever kind of RPC it is; then break off. Raises:
    ServerUnavailable when nobody answers."""
    return await ask_with_all(channel, method, (request,), metadata, timeout_s=timeout_s)


async def ask_with_all(
    channel: aio.Channel,
    method: MethodDescriptor,
    requests: Sequence[bytes],
    metadata: Metadata = (),
    *,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """The same with several messages, where the RPC takes a stream of them."""
    start = time.perf_counter()
    try:
        reply = await _first(channel, method, requests, metadata, timeout_s)
    except aio.AioRpcError as error:
        return read_status(error, time.perf_counter() - start)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ServerUnavailable("the server broke the call off") from None
    return Answer(grpc.StatusCode.OK, "", b"", reply, time.perf_counter() - start)


def read_status(error: aio.AioRpcError, took_s: float) -> Answer:
    """Raises: ServerUnavailable for a server that is not there."""
    details = error.trailing_metadata() or ()
    for key, value in details:
        if key == DETAILS_KEY and isinstance(value, bytes):
            return Answer(error.code(), _reason_in(value), value, b"", took_s)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        raise ServerUnavailable("no server answers, or it broke the connection off")
    text = f"{error.code().name} {error.details()}".encode()
    return Answer(error.code(), "", text, b"", took_s)


@asynccontextmanager
async def stream(
    channel: aio.Channel, method: MethodDescriptor, metadata: Metadata
) -> AsyncIterator["aio.StreamStreamCall[Any, Any]"]:
    """A two-way stream of bytes, broken off at the end."""
    open_call: Any = channel.stream_stream(path_of(method))
    call = open_call(metadata=metadata)
    try:
        yield call
    finally:
        call.cancel()


async def status_of(call: "aio.StreamStreamCall[Any, Any]", *, timeout_s: float) -> Answer | None:
    """How the server ends the stream; None: not within that time."""
    start = time.perf_counter()
    sent = SentStatus(call)
    try:
        async with asyncio.timeout(timeout_s):
            while await call.read() is not aio.EOF:
                pass
    except TimeoutError:
        return None
    except aio.AioRpcError as error:
        return read_status(sent.correct(error) or error, time.perf_counter() - start)
    return Answer(grpc.StatusCode.OK, "", b"", b"", time.perf_counter() - start)


async def _first(
    channel: aio.Channel,
    method: MethodDescriptor,
    requests: Sequence[bytes],
    metadata: Metadata,
    timeout_s: float,
) -> bytes:
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    open_call = kinds[method.client_streaming, method.server_streaming](path_of(method))
    sent = _each(requests) if method.client_streaming else requests[0]
    call = open_call(sent, metadata=metadata, timeout=timeout_s)
    status = SentStatus(call)
    if not method.server_streaming:
        reply: bytes = await call
        return reply
    try:
        first = await call.read()
        return first if isinstance(first, bytes) else b""
    except aio.AioRpcError as error:
        raise status.correct(error) or error from error
    finally:
        call.cancel()


async def _each(requests: Sequence[bytes]) -> AsyncIterator[bytes]:
    for request in requests:
        yield request


def _reason_in(details: bytes) -> str:
    status = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return str(info.reason)
    return ""


def reasons(answers: Iterable[Answer]) -> str:
    """For a report: what came, without repetition."""
    return ", ".join(sorted({answer.reason or answer.code.name for answer in answers}))
