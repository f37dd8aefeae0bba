"""What the tests of this folder share: a router on a real port and a reader of its errors."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from kvcluster.config import RouterConfig
from kvcluster.engine.api import Backend, Event, GenerationEvent, Output
from kvcluster.router.sent_status import SentStatus
from kvcluster.router.server import RouterServer
from kvcluster.rpc.v1 import common_pb2
from kvcluster.rpc.v1 import inference_service_pb2 as pb

PATH = "/kvcluster.rpc.v1.InferenceService/"


def local_config(**changes: float) -> RouterConfig:
    return RouterConfig(listen="127.0.0.1:0", insecure_local=True, **changes)


@asynccontextmanager
async def serving(*backends: Backend, **changes: float) -> AsyncIterator[RouterServer]:
    server = RouterServer(backends, local_config(**changes), health_interval_s=0.01)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(grace_s=0)


class Refusal(NamedTuple):
    code: grpc.StatusCode
    reason: str
    """Empty: the status came without ErrorInfo."""
    message: str
    metadata: dict[str, str]
    status: status_pb2.Status


async def refusal_of(call: Awaitable[object]) -> Refusal:
    """How `call` was refused. Fails the test when it was not."""
    with pytest.raises(aio.AioRpcError) as raised:
        await call
    return read_refusal(raised.value)


def read_refusal(error: aio.AioRpcError) -> Refusal:
    status = status_pb2.Status()
    info = error_details_pb2.ErrorInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            status.details[0].Unpack(info)
    return Refusal(error.code(), info.reason, error.details(), dict(info.metadata), status)


async def drain(call: aio.UnaryStreamCall | aio.StreamStreamCall) -> list[pb.GenerateResponse]:
    """All responses. Raises the call's status when it is an error."""
    sent = SentStatus(call)
    responses = []
    try:
        while (response := await call.read()) is not aio.EOF:
            responses.append(response)
    except aio.AioRpcError as error:
        corrected = sent.correct(error)
        if corrected is not None:
            raise corrected from error
    return responses


def setup(**fields: object) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        setup=pb.GenerateRequest(**{"model": "echo", "max_output_tokens": 4, **fields})
    )


def text_chunk(offset: int, text: str, **fields: int) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        chunk=pb.PromptChunk(offset=offset, input=common_pb2.TokenInput(text=text), **fields)
    )


def ids_chunk(offset: int, packed_ids: bytes, **fields: int) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        chunk=pb.PromptChunk(
            offset=offset, input=common_pb2.TokenInput(packed_ids=packed_ids), **fields
        )
    )


def text_of(events: Sequence[GenerationEvent | Event]) -> str:
    found = [event.event if isinstance(event, GenerationEvent) else event for event in events]
    return "".join(event.text for event in found if isinstance(event, Output))
