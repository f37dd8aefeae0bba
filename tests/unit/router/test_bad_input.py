"""Every wrong request gets its status and reason through the real port, and disturbs nobody."""

import asyncio

import pytest
from grpc import aio

from kvcluster.client import Client
from kvcluster.engine.api import Finished
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.bad_inputs import BAD_INPUTS, LIMIT_TOKENS, Code, generating, resuming
from tests.unit.router.fake_backend import FakeBackend, model_spec
from tests.unit.router.serving import drain, refusal_of, setup, text_of


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend(model_spec(max_context_tokens=LIMIT_TOKENS))


@pytest.mark.parametrize("case", BAD_INPUTS)
async def test_bad_input_is_refused_with_its_reason_while_another_stream_goes_on(
    case: str, client: Client, channel: aio.Channel, backend: FakeBackend
) -> None:
    attempt, code, reason = BAD_INPUTS[case]
    beside = client.generate(prompt="good", max_output_tokens=200)
    events = [await anext(beside) for _ in range(5)]

    refusal = await asyncio.wait_for(refusal_of(attempt(channel)), timeout=10)

    events += [event async for event in beside]
    assert (refusal.code, refusal.reason) == (code, reason)
    assert text_of(events) == "good" * 50
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert isinstance(events[-1].event, Finished)
    assert backend.num_held_tokens == 0


@pytest.mark.parametrize("case", [case for case, bad in BAD_INPUTS.items() if bad[2]])
async def test_every_refusal_is_a_sentence_in_the_status_and_in_its_details(
    case: str, client: Client, channel: aio.Channel
) -> None:
    async for _ in client.generate(prompt="good", max_output_tokens=1):
        pass

    refusal = await refusal_of(BAD_INPUTS[case][0](channel))

    assert refusal.message == refusal.status.message
    assert refusal.status.code == refusal.code.value[0]
    assert len(refusal.message.split()) >= 3
    assert "Traceback" not in refusal.message


async def test_a_prompt_over_the_limit_is_refused_before_its_upload_and_told_by_how_much(
    channel: aio.Channel,
) -> None:
    call = InferenceServiceStub(channel).StreamGenerate()
    await call.write(setup(input_tokens=LIMIT_TOKENS + 3))

    refusal = await refusal_of(drain(call))

    assert refusal.metadata == {"limit_tokens": str(LIMIT_TOKENS), "over_tokens": "7"}


async def test_an_unknown_model_is_answered_with_the_served_ones(channel: aio.Channel) -> None:
    refusal = await refusal_of(generating(model="other")(channel))

    assert "served: echo" in refusal.message


async def test_a_long_unknown_name_does_not_blow_up_the_answer(channel: aio.Channel) -> None:
    refusal = await refusal_of(generating(model="ä" * 100_000)(channel))

    assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
    assert len(refusal.message.encode()) < 600


async def test_another_tenants_generation_looks_exactly_like_none(
    client: Client, channel: aio.Channel
) -> None:
    async for _ in client.generate(prompt="a", max_output_tokens=1):
        pass

    absent = await refusal_of(resuming("tenants/default/generations/none")(channel))
    foreign = await refusal_of(resuming("tenants/other/generations/g0")(channel))

    assert foreign.status.SerializeToString() == absent.status.SerializeToString()


async def test_a_bug_is_internal_with_a_trace_id_and_without_its_text(
    channel: aio.Channel, client: Client, backend: FakeBackend
) -> None:
    assert await client.models()
    backend.failure = RuntimeError("secret prompt text")

    refusal = await refusal_of(generating()(channel))

    assert (refusal.code, refusal.reason) == (Code.INTERNAL, "INTERNAL")
    assert refusal.metadata["trace_id"] in refusal.message
    assert "secret" not in str(refusal)


async def test_a_field_that_is_wrong_is_named_in_a_bad_request(channel: aio.Channel) -> None:
    refusal = await refusal_of(generating(priority=101)(channel))

    assert refusal.metadata == {"field": "priority"}
    assert [detail.TypeName() for detail in refusal.status.details] == [
        "google.rpc.ErrorInfo",
        "google.rpc.BadRequest",
    ]
