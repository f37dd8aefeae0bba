"""The listener: who may start it, its health, its reflection, its end."""

import asyncio
import socket

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvcluster.client import Client
from kvcluster.config import RouterConfig
from kvcluster.errors import ConfigError, RankLost, ServerUnavailable
from kvcluster.router.server import CONTEXT_SERVICE_NAME, SERVICE_NAME, RouterServer
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from tests.unit.router.fake_backend import FakeBackend
from tests.unit.router.serving import PATH, local_config, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_server_without_authentication_does_not_start_unasked() -> None:
    with pytest.raises(ConfigError, match="insecure_local"):
        RouterServer([], RouterConfig(listen="127.0.0.1:0"))


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "example.com:0"])
def test_a_server_without_authentication_is_not_reachable_from_outside(listen: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        RouterServer([], RouterConfig(listen=listen, insecure_local=True))


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.0.0.2:0", "localhost:0"])
async def test_a_loopback_address_is_served_and_port_0_becomes_a_real_one(listen: str) -> None:
    server = RouterServer([FakeBackend()], RouterConfig(listen=listen, insecure_local=True))
    await server.start()
    try:
        async with Client(server.address) as client:
            assert await client.health()
    finally:
        await server.stop(grace_s=0)
    assert not server.address.endswith(":0")


async def test_a_port_in_use_is_a_config_error(server: RouterServer) -> None:
    second = RouterServer([], RouterConfig(listen=server.address, insecure_local=True))

    with pytest.raises(ConfigError, match="cannot be bound"):
        await second.start()
    await second.stop(grace_s=0)


async def test_health_follows_the_engine(channel: aio.Channel, backend: FakeBackend) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    seen = []

    async with asyncio.timeout(10):
        async for response in stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME)):
            seen.append(response.status)
            backend.is_ready = len(seen) == 2
            if len(seen) == 3:
                break

    assert seen == [SERVING, NOT_SERVING, SERVING]


@pytest.mark.parametrize("failure", [RankLost("rank 0 was lost"), RuntimeError("a bug")])
async def test_an_engine_that_cannot_be_asked_is_not_healthy_until_it_can(
    failure: Exception, backend: FakeBackend
) -> None:
    backend.status_failure = failure
    async with serving(backend) as server, aio.insecure_channel(server.address) as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        seen = [(await watched.read()).status]
        backend.status_failure = None
        seen.append((await watched.read()).status)
        watched.cancel()

    assert seen == [NOT_SERVING, SERVING]


async def test_an_engine_that_does_not_answer_is_not_healthy() -> None:
    class Silent(FakeBackend):
        async def status(self) -> object:
            return await asyncio.get_running_loop().create_future()

    server = RouterServer([Silent()], local_config(), status_timeout_s=0.05)
    await server.start()
    async with Client(server.address) as client:
        assert not await client.health()
    await server.stop(grace_s=0)


async def test_reflection_lists_what_is_served(channel: aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    async for response in stub.ServerReflectionInfo(iter([request])):
        names = {service.name for service in response.list_services_response.service}

    assert names == {
        SERVICE_NAME,
        CONTEXT_SERVICE_NAME,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_every_method_of_the_proto_is_served(channel: aio.Channel) -> None:
    for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods:
        with pytest.raises(aio.AioRpcError) as raised:
            await channel.unary_unary(PATH + method.name)(b"\xff")
        assert raised.value.code().name == "INVALID_ARGUMENT", method.name


async def test_stop_ends_running_streams_and_their_generations(backend: FakeBackend) -> None:
    backend.gate.clear()
    async with serving(backend) as server, Client(server.address) as client:
        events = client.generate(prompt="hello")
        await anext(events)

        await server.stop(grace_s=0)

        with pytest.raises(ServerUnavailable):
            async for _ in events:
                pass
        await backend.until(lambda generation: generation.finished is not None)


async def test_stop_lets_running_streams_end_within_the_grace(backend: FakeBackend) -> None:
    backend.gate.clear()
    async with serving(backend) as server, Client(server.address) as client:
        events = client.generate(prompt="hello", max_output_tokens=3)
        await anext(events)
        stopping = asyncio.create_task(server.stop(grace_s=10))

        backend.gate.set()
        rest = [event async for event in events]

        await stopping
        assert rest[-1].sequence == len(rest) + 1


async def test_a_stopped_server_gives_its_port_back(backend: FakeBackend) -> None:
    async with serving(backend) as server:
        address = server.address

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(address.rpartition(":")[2])))
