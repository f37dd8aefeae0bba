"""A router on a real port, in front of the engine of `fake_backend`."""

from collections.abc import AsyncIterator

import pytest
from grpc import aio

from kvcluster.client import Client
from kvcluster.router.server import RouterServer
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.unit.router.fake_backend import FakeBackend
from tests.unit.router.serving import serving


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def server(backend: FakeBackend) -> AsyncIterator[RouterServer]:
    async with serving(backend) as server:
        yield server


@pytest.fixture
async def channel(server: RouterServer) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: aio.Channel) -> InferenceServiceStub:
    return InferenceServiceStub(channel)


@pytest.fixture
async def client(server: RouterServer) -> AsyncIterator[Client]:
    async with Client(server.address) as client:
        yield client
