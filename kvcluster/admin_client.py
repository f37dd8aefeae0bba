"""The asyncio client of the admin port: sends any request of `TenantService`, raises our errors."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from kvcluster.client_tls import ClientTls, open_channel
from kvcluster.errors import ServerUnavailable
from kvcluster.router.status import error_from_rpc
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.rpc.v1.tenant_service_pb2_grpc import TenantServiceStub

_SERVICE = pb.DESCRIPTOR.services_by_name["TenantService"]
_METHODS = {method.input_type.full_name: method for method in _SERVICE.methods}


class AdminClient:
    """A connection to one admin port. An async context manager; opens at the first call.

    Methods raise the error that the server answered with, and ServerUnavailable when there is none.
    """

    def __init__(
        self, address: str, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        """As of `client.Client`."""
        self._channel = open_channel(address, tls)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def ask(self, request: Message, *, timeout_s: float | None = None) -> Message:
        """The answer to a request of any RPC with one answer: its type says which is meant."""
        method = _METHODS[request.DESCRIPTOR.full_name]
        call = self._channel.unary_unary(
            f"/{_SERVICE.full_name}/{method.name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        with _typed_errors():
            answer: Message = await call(request, metadata=self._metadata, timeout=timeout_s)
        return answer

    async def watch_usage(self, request: pb.WatchTenantUsageRequest) -> AsyncIterator[Message]:
        """What the tenant uses, again and again, until the iteration is stopped."""
        call = TenantServiceStub(self._channel).WatchTenantUsage(request, metadata=self._metadata)
        try:
            with _typed_errors():
                async for usage in call:
                    yield usage
        finally:
            call.cancel()


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except aio.AioRpcError as error:
        metadata = error.trailing_metadata()
        raise error_from_rpc(error.code(), error.details() or "", metadata) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ServerUnavailable("the call was broken off: try again") from None
