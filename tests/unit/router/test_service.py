"""What a client of the service sees when nothing goes wrong, through the real port."""

import asyncio

import pytest
from grpc import aio

from kvcluster.client import Client
from kvcluster.engine.api import Admitted, Finished, FinishReason, GenerationState, Output, Phase
from kvcluster.errors import RankLost
from kvcluster.router import upload
from kvcluster.rpc.v1 import common_pb2
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.unit.router.fake_backend import FakeBackend, model_spec
from tests.unit.router.serving import drain, refusal_of, serving, setup, text_chunk, text_of

MIB = 1024 * 1024


async def test_events_run_from_admitted_to_finished_without_a_gap(client: Client) -> None:
    events = [event async for event in client.generate(prompt="hello", max_output_tokens=7)]

    assert isinstance(events[0].event, Admitted)
    assert isinstance(events[-1].event, Finished)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert {event.generation for event in events} == {"tenants/default/generations/g0"}
    assert text_of(events) == "hellohe"


async def test_admitted_comes_before_any_of_the_prompt_is_sent(
    stub: InferenceServiceStub,
) -> None:
    call = stub.StreamGenerate()
    await call.write(setup())

    first = await call.read()

    assert first.HasField("admitted")
    call.cancel()


async def test_progress_comes_while_the_upload_is_still_running(
    stub: InferenceServiceStub,
) -> None:
    call = stub.StreamGenerate()
    await call.write(setup())
    await call.write(text_chunk(0, "hello"))

    await call.read()
    second = await call.read()

    assert second.progress.phase == pb.Progress.PHASE_PREFILLING
    assert second.progress.done_tokens == len("hello")
    call.cancel()


async def test_generate_with_an_inline_prompt_gives_the_same_as_an_upload(
    stub: InferenceServiceStub, client: Client
) -> None:
    request = pb.GenerateRequest(
        max_output_tokens=5, prompt=common_pb2.TokenInput(ids={"ids": b"hello"})
    )

    responses = await drain(stub.Generate(request))

    uploaded = [e async for e in client.generate(prompt="hello", max_output_tokens=5)]
    assert "".join(response.output.text for response in responses) == text_of(uploaded)


async def test_a_generation_is_replayed_from_each_of_its_positions(client: Client) -> None:
    events = [event async for event in client.generate(prompt="hello", max_output_tokens=5)]
    name = events[0].generation

    for position in range(len(events) + 1):
        replayed = [e async for e in client.resume(name, after_sequence=position)]
        assert replayed == events[position:]


async def test_a_running_generation_is_followed_by_a_second_reader_to_its_end(
    client: Client, backend: FakeBackend
) -> None:
    backend.gate.clear()
    first = client.generate(prompt="hello", max_output_tokens=5)
    name = (await anext(first)).generation
    second = client.resume(name)
    await anext(second)

    backend.gate.set()
    seen = [[event async for event in reader] for reader in (first, second)]

    assert seen[0] == seen[1]


async def test_twenty_calls_with_one_request_id_are_one_generation(
    client: Client, backend: FakeBackend
) -> None:
    async def call() -> str:
        options = {"request_id": "once", "max_output_tokens": 5}
        return text_of([e async for e in client.generate(prompt="hello" * 1000, **options)])

    texts = await asyncio.gather(*(call() for _ in range(20)))

    assert set(texts) == {"hello"}
    assert len(backend.generations) == 1


async def test_a_second_upload_goes_on_when_the_first_breaks_off(
    client: Client, stub: InferenceServiceStub, backend: FakeBackend
) -> None:
    first, second = stub.StreamGenerate(), stub.StreamGenerate()
    for call in (first, second):
        await call.write(setup(request_id="again"))
        await call.read()
        await call.write(text_chunk(0, "hel"))
    await backend.until(lambda generation: generation.size == 3)

    first.cancel()
    await backend.until(lambda generation: generation.num_readers == 1)
    await second.write(text_chunk(3, "lo"))
    await second.done_writing()
    responses = await drain(second)

    assert "".join(response.output.text for response in responses) == "hell"


async def test_a_prompt_of_declared_length_does_not_wait_for_a_late_cancel(
    stub: InferenceServiceStub, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "CANCEL_SETTLES_S", 3600.0)
    messages = [setup(input_tokens=5), text_chunk(0, "hello")]

    async with asyncio.timeout(10):
        responses = await drain(stub.StreamGenerate(iter(messages)))

    assert responses[-1].HasField("finished")


async def test_a_blocked_engine_holds_the_client_back(
    stub: InferenceServiceStub, backend: FakeBackend
) -> None:
    backend.gate.clear()
    call = stub.StreamGenerate()
    await call.write(setup())
    sent = 0

    async def send_64_mib() -> None:
        nonlocal sent
        while sent < 64 * MIB:
            await call.write(text_chunk(sent, "a" * MIB))
            sent += MIB

    sending = asyncio.create_task(send_64_mib())
    await backend.until(lambda generation: generation.size > 0)
    # Nothing more moves once the windows are full; this is how long it may take to be sure.
    await asyncio.wait({sending}, timeout=0.5)

    assert backend.num_received_tokens == MIB
    assert sent <= 6 * MIB
    sending.cancel()
    call.cancel()


async def test_an_upload_of_many_chunks_arrives_whole(client: Client, backend: FakeBackend) -> None:
    ids = [number % 1000 for number in range(1_000_000)]

    async for _ in client.generate(prompt_ids=ids, max_output_tokens=1):
        pass

    (generation,) = backend.generations.values()
    assert generation.ids.tolist() == ids


async def test_the_calls_deadline_reaches_the_engine(client: Client, backend: FakeBackend) -> None:
    async for _ in client.generate(prompt="a", max_output_tokens=1, timeout_s=30.0):
        pass

    (generation,) = backend.generations.values()
    assert 25.0 < generation.request.deadline_s < 31.0  # the wire rounds up


async def test_a_generation_that_reaches_its_deadline_ends_with_that_status(
    client: Client, stub: InferenceServiceStub, backend: FakeBackend
) -> None:
    """The engine's clock may ring before the transport's; both tell the same."""
    events = client.generate(prompt="a", max_output_tokens=1)
    backend.gate.clear()
    name = (await anext(events)).generation
    backend._end(backend.generations["g0"], FinishReason.DEADLINE)

    request = pb.ResumeGenerationRequest(name=name)
    refusal = await refusal_of(drain(stub.ResumeGeneration(request)))

    assert (refusal.code.name, refusal.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    await events.aclose()


async def test_cancel_generation_ends_the_stream_with_finished_cancelled(
    client: Client, backend: FakeBackend
) -> None:
    backend.gate.clear()
    events = client.generate(prompt="hello")
    name = (await anext(events)).generation

    record = await client.cancel(name)
    last = [event async for event in events][-1].event

    assert record.state is GenerationState.CANCELLED
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.CANCELLED


async def test_cancel_generation_ends_an_upload_that_is_held_back(
    stub: InferenceServiceStub, client: Client, backend: FakeBackend
) -> None:
    backend.gate.clear()
    call = stub.StreamGenerate()
    await call.write(setup())
    await call.read()
    await call.write(text_chunk(0, "a" * MIB))
    await backend.until(lambda generation: generation.size > 0)

    await client.cancel("tenants/default/generations/g0")
    responses = await drain(call)

    assert responses[-1].finished.reason == common_pb2.FINISH_REASON_CANCELLED


async def test_cancelling_twice_changes_nothing(client: Client) -> None:
    events = [event async for event in client.generate(prompt="a", max_output_tokens=1)]

    record = await client.cancel(events[0].generation)

    assert record.state is GenerationState.SUCCEEDED


async def test_generations_are_listed_newest_first_over_pages(
    client: Client, stub: InferenceServiceStub
) -> None:
    for _ in range(5):
        async for _ in client.generate(prompt="a", max_output_tokens=1):
            pass

    request = pb.ListGenerationsRequest(parent="tenants/default", page_size=2)
    pages = []
    while True:
        page = await stub.ListGenerations(request)
        pages.append([generation.name.rsplit("/", 1)[1] for generation in page.generations])
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token

    assert pages == [["g4", "g3"], ["g2", "g1"], ["g0"]]


async def test_generations_are_listed_by_state(client: Client, backend: FakeBackend) -> None:
    async for _ in client.generate(prompt="a", max_output_tokens=1):
        pass
    backend.gate.clear()
    running = client.generate(prompt="b")
    await anext(running)

    ended = [record.generation async for record in client.list(state=GenerationState.SUCCEEDED)]

    assert ended == ["tenants/default/generations/g0"]
    await running.aclose()


async def test_a_failed_generation_tells_so_in_its_last_event_and_in_the_status(
    stub: InferenceServiceStub, backend: FakeBackend
) -> None:
    call = stub.StreamGenerate()
    await call.write(setup())
    admitted = await call.read()
    await backend.fail("g0", 0, "RankLost", "rank 1 was lost: try again")

    finished = await call.read()
    refusal = await refusal_of(drain(call))

    assert (admitted.sequence, finished.sequence) == (1, 2)
    assert finished.finished.error.reason == common_pb2.ERROR_REASON_SHARD_LOST
    assert finished.finished.error.message == "rank 1 was lost: try again"
    assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "SHARD_LOST")


async def test_an_empty_model_name_means_the_only_one_there_is(
    client: Client, backend: FakeBackend
) -> None:
    async for _ in client.generate(prompt="a", max_output_tokens=1):
        pass

    assert backend.generations["g0"].request.model == "echo"


@pytest.fixture
async def two_models() -> tuple[FakeBackend, FakeBackend]:
    return FakeBackend(model_spec("one")), FakeBackend(model_spec("two"))


async def test_each_model_is_served_by_its_own_backend(
    two_models: tuple[FakeBackend, FakeBackend],
) -> None:
    async with serving(*two_models) as server, Client(server.address) as client:
        events = [e async for e in client.generate(prompt="a", model="two", max_output_tokens=1)]
        record = await client.get(events[0].generation)
        names = [model.name for model in await client.models()]

    assert names == ["one", "two"]
    assert record.state is GenerationState.SUCCEEDED
    assert not two_models[0].generations


async def test_an_empty_model_name_is_refused_when_several_are_served(
    two_models: tuple[FakeBackend, FakeBackend],
) -> None:
    async with serving(*two_models) as server, aio.insecure_channel(server.address) as channel:
        call = InferenceServiceStub(channel).StreamGenerate(iter([setup(model="")]))
        refusal = await refusal_of(drain(call))

    assert refusal.reason == "INVALID_FIELD"
    assert "one, two" in refusal.message


async def test_progress_and_outputs_are_what_the_engine_said(client: Client) -> None:
    events = [e.event async for e in client.generate(prompt_ids=[7, 8], max_output_tokens=2)]

    phases = {
        event.phase for event in events if not isinstance(event, Admitted | Output | Finished)
    }
    outputs = [event.token_ids for event in events if isinstance(event, Output)]
    assert phases == {Phase.PREFILLING}
    assert outputs == [(7,), (8,)]


async def test_a_policy_in_parts_reaches_the_engine_as_text(
    stub: InferenceServiceStub, backend: FakeBackend
) -> None:
    window = pb.PolicyChoice(method="window", arguments={"size": pb.PolicyValue(number=128)})
    request = pb.GenerateRequest(
        max_output_tokens=1,
        prompt=common_pb2.TokenInput(text="a"),
        cache_policy=pb.CachePolicy(choices=[window, pb.PolicyChoice(method="int4")]),
    )

    responses = await drain(stub.Generate(request))

    assert backend.generations["g0"].request.policy == "window:size=128 + int4"
    assert responses[0].admitted.policy == "int4 + window:size=128"


async def test_the_answer_tells_what_a_bound_stood_for(client: Client) -> None:
    events = client.generate(prompt="a", max_output_tokens=1, policy="auto:ppl<=1.0%")

    first = (await anext(events)).event

    await events.aclose()
    assert isinstance(first, Admitted)
    assert (first.policy, first.policy_bound) == ("int4", "auto: ppl<=1%")


async def test_an_estimate_takes_a_policy_in_both_forms(stub: InferenceServiceStub) -> None:
    parts = pb.CachePolicy(bound=pb.PolicyBound(max_perplexity_increase=0.01))
    requests = [
        pb.EstimateGenerationRequest(input_tokens=1, max_output_tokens=1, **policy)
        for policy in ({"policy": "auto: ppl<=1%"}, {"cache_policy": parts}, {"policy": "int5"})
    ]

    text, in_parts, refused = [await stub.EstimateGeneration(request) for request in requests]

    assert text == in_parts
    assert (text.admissible, text.policy) == (True, "int4")
    assert (refused.admissible, refused.policy) == (False, "")
    assert "'int5'" in refused.refusal.message


async def test_a_fault_of_a_policy_in_parts_is_told_by_its_part(
    stub: InferenceServiceStub,
) -> None:
    """Its sender has never seen the text in which the engine found it."""
    choices = [pb.PolicyChoice(method="window"), pb.PolicyChoice(method="int5")]
    parts = pb.CachePolicy(choices=choices)
    asked = pb.EstimateGenerationRequest(input_tokens=1, max_output_tokens=1, cache_policy=parts)
    request = pb.GenerateRequest(
        max_output_tokens=1, prompt=common_pb2.TokenInput(text="a"), cache_policy=parts
    )

    estimate = await stub.EstimateGeneration(asked)
    refusal = await refusal_of(drain(stub.Generate(request)))

    field = "cache_policy.choices[1].method"
    assert refusal.metadata["field"] == field
    for message in (refusal.message, estimate.refusal.message):
        assert message.startswith(f"{field}: no method is called 'int5'")


async def test_a_server_whose_engine_does_not_answer_says_so(backend: FakeBackend) -> None:
    backend.status_failure = RankLost("rank 0 was lost")
    async with serving(backend) as server, aio.insecure_channel(server.address) as channel:
        refusal = await refusal_of(InferenceServiceStub(channel).ListModels(pb.ListModelsRequest()))

    assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "SHARD_LOST")
