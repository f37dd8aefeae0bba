"""Wrong requests at the real engine: refused with their reason, nothing kept, nobody disturbed."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest
import pytest_asyncio
from grpc import aio

from kvcluster.client import Client
from kvcluster.engine.api import Finished, GenerationEvent, Output
from kvcluster.model.loader import LoadedModel
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.bad_inputs import BAD_INPUTS, Code, resuming
from tests.e2e.conftest import CONFIG, Cluster
from tests.fake_engine import CharacterTokenizer
from tests.thread_executor import running_engine
from tests.unit.router.serving import drain, ids_chunk, refusal_of, serving, setup

PROMPT = list(range(3, 63))
NUM_TOKENS = 40


@pytest.fixture
async def echo(tiny_model: LoadedModel) -> AsyncIterator[Cluster]:
    """The tiny model with a tokenizer, under the name that the bad inputs ask for."""
    spec = msgspec.structs.replace(tiny_model.spec, name="echo", tokenizer_digest="characters")
    async with (
        running_engine(replace(tiny_model, spec=spec), CONFIG, CharacterTokenizer()) as (
            service,
            executor,
        ),
        serving(service, upload_idle_timeout_s=20.0) as server,
    ):
        yield Cluster(server.address, service, executor)


def token_ids(events: list[GenerationEvent]) -> list[int]:
    outputs = [event.event for event in events if isinstance(event.event, Output)]
    return [token_id for output in outputs for token_id in output.token_ids]


async def generate(client: Client) -> list[GenerationEvent]:
    stream = client.generate(prompt_ids=PROMPT, max_output_tokens=NUM_TOKENS, ignore_eos=True)
    return [event async for event in stream]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(tiny_model: LoadedModel) -> list[int]:
    """What the prompt gives where nobody asks for anything else."""
    async with (
        running_engine(tiny_model, CONFIG) as (service, _),
        serving(service) as server,
        Client(server.address) as client,
    ):
        return token_ids(await generate(client))


@pytest.mark.parametrize("case", BAD_INPUTS)
async def test_a_wrong_request_leaves_no_blocks_and_disturbs_nobody(
    case: str, echo: Cluster, alone: list[int]
) -> None:
    attempt, code, reason = BAD_INPUTS[case]
    async with Client(echo.address) as client, aio.insecure_channel(echo.address) as channel:
        beside = asyncio.ensure_future(generate(client))

        refusal = await asyncio.wait_for(refusal_of(attempt(channel)), timeout=20)

        events = await beside
    assert (refusal.code, refusal.reason) == (code, reason)
    assert token_ids(events) == alone
    assert isinstance(events[-1].event, Finished)
    await echo.until_nothing_is_left()


async def test_a_generation_can_be_resumed_until_it_expires(tiny_model: LoadedModel) -> None:
    config = replace(CONFIG, engine=replace(CONFIG.engine, retention_s=0))
    async with (
        running_engine(tiny_model, config) as (service, _),
        serving(service) as server,
        Client(server.address) as client,
        aio.insecure_channel(server.address) as channel,
    ):
        events = await generate(client)
        await generate(client)

        refusal = await refusal_of(resuming(events[0].generation)(channel))

    assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "GENERATION_NOT_FOUND")


async def test_an_upload_that_stalls_is_ended_and_frees_its_blocks(tiny_model: LoadedModel) -> None:
    async with (
        running_engine(tiny_model, CONFIG) as (service, executor),
        serving(service, upload_idle_timeout_s=0.2) as server,
        aio.insecure_channel(server.address) as channel,
    ):
        cluster = Cluster(server.address, service, executor)
        call = InferenceServiceStub(channel).StreamGenerate()
        await call.write(setup(model="tiny"))
        await call.write(ids_chunk(0, bytes(4 * 100)))

        refusal = await refusal_of(drain(call))

        await cluster.until_nothing_is_left()
    assert (refusal.code, refusal.reason) == (Code.ABORTED, "UPLOAD_STALLED")
