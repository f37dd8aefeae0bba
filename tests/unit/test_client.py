"""`Client` against a router on a real port."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

import kvcluster
from kvcluster.client import Client
from kvcluster.engine.api import Admitted, Finished, FinishReason, GenerationEvent, GenerationState
from kvcluster.errors import (
    ContextTooLong,
    DeadlineExceeded,
    GenerationNotFound,
    InvalidField,
    KvClusterError,
    RankLost,
    ServerUnavailable,
)
from kvcluster.router.auth import Caller, CallMetadata, InsecureLocal
from kvcluster.router.server import RouterServer
from tests.unit.router.fake_backend import FakeBackend, model_spec
from tests.unit.router.serving import local_config, serving, text_of


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend(model_spec(max_context_tokens=2_000_000))


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[Client]:
    async with serving(backend) as server, Client(server.address) as client:
        yield client


async def collect(client: Client, **options: object) -> list[GenerationEvent]:
    return [event async for event in client.generate(**{"max_output_tokens": 6, **options})]


def test_the_package_has_its_public_names_without_loading_grpc_or_torch() -> None:
    script = (
        "import sys, kvcluster; kvcluster.ClusterConfig, kvcluster.RankLost;"
        "assert not {'grpc', 'torch', 'ray'} & set(sys.modules);"
        "kvcluster.Client; assert not {'torch', 'ray'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_error_is_a_public_name() -> None:
    kinds = {KvClusterError}
    while more := {child for kind in kinds for child in kind.__subclasses__()} - kinds:
        kinds |= more

    ours = {kind.__name__ for kind in kinds if kind.__module__ == "kvcluster.errors"}
    assert ours <= set(kvcluster.__all__)
    assert all(hasattr(kvcluster, name) for name in kvcluster.__all__)


async def test_text_of_more_than_a_message_arrives_whole(
    client: Client, backend: FakeBackend
) -> None:
    text = "aé€😀" * 150_000

    await collect(client, prompt=text)

    assert bytes(backend.generations["g0"].ids.tolist()) == text.encode()


async def test_an_empty_prompt_is_refused(client: Client) -> None:
    with pytest.raises(InvalidField, match="prompt"):
        await collect(client, prompt="")


async def test_a_prompt_may_be_produced_while_it_is_sent(client: Client) -> None:
    async def words() -> AsyncIterator[str]:
        for word in ("hel", "lo", "!"):
            yield word

    assert text_of(await collect(client, prompt=words())) == "hello!"
    assert text_of(await collect(client, prompt=["hel", "lo!"])) == "hello!"
    assert text_of(await collect(client, prompt_ids=iter([b"h\0\0\0", [105]]))) == "hihihi"


async def test_a_prompt_that_cannot_be_read_is_reported_as_it_is(
    client: Client, backend: FakeBackend
) -> None:
    async def words() -> AsyncIterator[str]:
        yield "hello"
        await backend.until(lambda generation: True)
        raise OSError("the file went away")

    with pytest.raises(OSError, match="went away"):
        await collect(client, prompt=words())
    await backend.until(lambda generation: generation.finished is not None)
    assert not backend.generations["g0"].is_complete


async def test_options_reach_the_engine(client: Client, backend: FakeBackend) -> None:
    await collect(
        client,
        prompt_ids=[1, 2, 3],
        temperature=1,
        seed=5,
        stop=["x"],
        policy="exact",
        request_id="r",
        priority=3,
        disconnect_grace_s=1.5,
    )

    request = backend.generations["g0"].request
    assert (request.sampling.temperature, request.sampling.seed) == (1.0, 5)
    assert request.sampling.stop == ("x",)
    assert (request.policy, request.request_id, request.priority) == ("exact", "r", 3)
    assert (request.disconnect_grace_s, request.input_tokens) == (1.5, 3)


async def test_an_unknown_option_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="temprature"):
        await collect(client, prompt="a", temprature=1.0)


@pytest.mark.parametrize("options", [{"temperature": "hot"}, {"max_output_tokens": -1}])
async def test_an_option_of_the_wrong_kind_is_refused_before_the_call(
    options: dict[str, object], client: Client, backend: FakeBackend
) -> None:
    with pytest.raises(InvalidField, match="options"):
        await collect(client, prompt="a", **options)
    assert not backend.generations


async def test_refusals_are_the_errors_of_this_package(client: Client) -> None:
    with pytest.raises(ContextTooLong) as raised:
        await collect(client, prompt_ids=bytes(4 * 2_000_000))
    with pytest.raises(GenerationNotFound):
        await client.get("tenants/default/generations/none")

    assert raised.value.metadata["over_tokens"] == "6"


async def test_an_upload_that_is_refused_midway_always_tells_why(client: Client) -> None:
    """A write that fails as the call ends must not hide the status."""
    for _ in range(30):
        with pytest.raises(ContextTooLong):
            await collect(client, prompt_ids=iter([bytes(1_000_000)] * 9))


async def test_a_failed_generation_gives_finished_and_then_its_error(
    client: Client, backend: FakeBackend
) -> None:
    backend.gate.clear()
    events = client.generate(prompt="hello")
    seen = [await anext(events)]
    await backend.fail("g0", 0, "RankLost", "rank 1 was lost: try again")

    async def read_on() -> None:
        async for event in events:
            seen.append(event)

    with pytest.raises(RankLost, match="rank 1"):
        await read_on()

    assert isinstance(seen[0].event, Admitted)
    assert isinstance(seen[-1].event, Finished)
    assert seen[-1].event.error_kind == "RankLost"


async def test_a_call_over_its_time_is_deadline_exceeded(
    client: Client, backend: FakeBackend
) -> None:
    backend.gate.clear()

    with pytest.raises(DeadlineExceeded):
        await collect(client, prompt="a", timeout_s=0.1)


async def test_a_server_that_is_not_there_is_server_unavailable() -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(ServerUnavailable):
            await collect(client, prompt="a")
        with pytest.raises(ServerUnavailable):
            await client.health()


async def test_leaving_the_loop_cancels_the_generation(
    client: Client, backend: FakeBackend
) -> None:
    async for event in client.generate(prompt="hello", max_output_tokens=100_000):
        if event.sequence == 5:
            break
    await backend.until(lambda generation: generation.finished is not None)

    assert backend.generations["g0"].finished.reason is FinishReason.CANCELLED


async def test_cancelling_the_callers_task_cancels_the_generation(
    client: Client, backend: FakeBackend
) -> None:
    backend.gate.clear()
    task = asyncio.create_task(collect(client, prompt="hello"))
    await backend.until(lambda generation: generation.num_readers == 1)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await backend.until(lambda generation: generation.finished is not None)

    assert backend.num_held_tokens == 0


async def test_the_unary_calls_answer_with_records(client: Client) -> None:
    events = await collect(client, prompt="hello")
    name = events[0].generation

    record = await client.get(name)
    estimate = await client.estimate(input_tokens=10)
    refused = await client.estimate(input_tokens=3_000_000)

    assert (record.generation, record.state) == (name, GenerationState.SUCCEEDED)
    assert [found async for found in client.list()] == [record]
    assert await client.cancel(name) == record
    assert await client.count_tokens(prompt="hello") == 5
    assert estimate.is_admissible
    assert (refused.is_admissible, refused.reason) == (False, "CONTEXT_TOO_LONG")
    (model,) = await client.models()
    assert (model.name, model.default_policy) == ("echo", "exact")
    assert "window:size=4096" in model.policy_methods
    assert await client.health()


async def test_an_api_key_travels_as_a_bearer_token() -> None:
    class Recording(InsecureLocal):
        def authenticate(self, metadata: CallMetadata) -> Caller:
            self.seen = dict(metadata)
            return super().authenticate(metadata)

    authenticator = Recording()
    server = RouterServer([FakeBackend()], local_config(), authenticator=authenticator)
    await server.start()
    async with Client(server.address, api_key="k") as client:
        await client.models()
    await server.stop(grace_s=0)

    assert authenticator.seen["authorization"] == "Bearer k"
