"""The `Backend` that the router calls."""

import asyncio
import random
from contextlib import aclosing

import pytest

from kvcluster.engine.api import (
    Finished,
    FinishReason,
    GenerationState,
    TextChunk,
    TokenChunk,
)
from kvcluster.errors import (
    ContextTooLong,
    Draining,
    GenerationNotFound,
    InvalidField,
    KvClusterError,
    ModelNotFound,
    PromptCorrupt,
    ResumeExpired,
    UploadStalled,
)
from kvcluster.types import DEFAULT_TENANT, GenerationId
from tests.fake_engine import (
    VOCAB_SIZE,
    packed,
    request,
)
from tests.unit.engine.serving import BLUE, PROMPT, Served


async def test_a_prompt_in_chunks_gives_the_tokens_of_the_whole(served: Served) -> None:
    generation = await served.open()
    for offset in range(0, 20, 7):
        await served.send(generation, PROMPT[offset : offset + 7], offset)
    await served.service.finish_prompt(generation, 0)

    assert await served.output(generation) == served.expected(PROMPT)


async def test_text_is_encoded_and_answered_with_text(served: Served) -> None:
    generation = await served.open()
    await served.service.append_prompt(generation, 0, TextChunk(0, "hello "))
    await served.service.append_prompt(generation, 0, TextChunk(6, "world"))
    await served.service.finish_prompt(generation, 0)

    expected = served.expected([ord(character) for character in "hello world"])
    assert await served.output(generation) == expected
    assert served.fake.text(generation) == "".join(map(chr, expected))


async def test_prefill_starts_while_the_upload_is_running(served: Served) -> None:
    generation = await served.open()
    await served.send(generation, PROMPT)
    while served.fake.engine.find(generation).request.num_computed < 16:
        await asyncio.sleep(0)

    assert not served.fake.engine.find(generation).request.is_prompt_complete


async def test_a_client_that_is_ahead_of_the_prefill_is_held_back(served: Served) -> None:
    served.gate.clear()
    generation = await served.open()
    sending = asyncio.create_task(served.send(generation, [1] * 100))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not sending.done()

    served.gate.set()
    await sending


async def test_a_client_that_is_held_back_hears_of_the_end(served: Served) -> None:
    served.gate.clear()
    generation = await served.open()
    sending = asyncio.create_task(served.send(generation, [1] * 100))
    await asyncio.sleep(0)

    await served.service.cancel(DEFAULT_TENANT, generation)

    with pytest.raises(GenerationNotFound, match="cancelled"):
        await sending


@pytest.mark.parametrize(("offset", "fault"), [(5, "gap"), (3, "overlap")])
async def test_a_chunk_that_does_not_continue_the_last_ends_the_generation(
    served: Served, offset: int, fault: str
) -> None:
    generation = await served.open()
    await served.send(generation, PROMPT[:4])

    with pytest.raises(PromptCorrupt, match=fault):
        await served.send(generation, PROMPT[4:], offset)

    assert served.fake.finished(generation).error_kind == "PromptCorrupt"


async def test_text_and_ids_cannot_be_mixed(served: Served) -> None:
    generation = await served.open()
    await served.send(generation, PROMPT[:4])

    with pytest.raises(InvalidField, match="mixed"):
        await served.service.append_prompt(generation, 0, TextChunk(4, "x"))


async def test_bad_uploads_leave_no_blocks_and_do_not_disturb_others(served: Served) -> None:
    neighbour = await served.start(PROMPT, 30)
    for chunk, error in (
        (TokenChunk(0, packed([VOCAB_SIZE])), InvalidField),
        (TokenChunk(0, bytes(6)), InvalidField),
        (TokenChunk(0, packed([1] * 199)), ContextTooLong),
        (TokenChunk(9, packed([1])), PromptCorrupt),
        (TextChunk(0, "\udfff"), InvalidField),
    ):
        generation = await served.open()
        with pytest.raises(error):
            await served.service.append_prompt(generation, 0, chunk)
        await served.service.fail(generation, 0, "InvalidField", "as the router would")
        assert served.fake.reason(generation) is FinishReason.ERROR

    empty = await served.open()
    with pytest.raises(InvalidField, match="empty"):
        await served.service.finish_prompt(empty, 0)

    assert await served.output(neighbour) == served.expected(PROMPT, 30)
    await served.settled()
    assert served.fake.num_leaked == 0


async def test_an_upload_that_the_router_gives_up_is_told_to_the_reader(served: Served) -> None:
    generation = await served.open()
    await served.send(generation, PROMPT[:9])
    await served.service.fail(generation, 0, "UploadStalled", "no chunk for 60 s")

    last = (await served.read(generation))[-1].event
    assert isinstance(last, Finished)
    assert (last.error_kind, last.error_message) == ("UploadStalled", "no chunk for 60 s")
    with pytest.raises(UploadStalled):
        await served.send(generation, PROMPT[9:], 9)


async def test_a_complete_upload_cannot_be_given_up(served: Served) -> None:
    generation = await served.start(PROMPT)
    await served.service.fail(generation, 0, "UploadStalled", "too late")

    assert await served.output(generation) == served.expected(PROMPT)


async def test_events_are_replayed_from_any_of_them(served: Served) -> None:
    generation = await served.start(PROMPT)
    everything = await served.read(generation)

    for after in range(len(everything) + 1):
        assert await served.read(generation, after) == everything[after:]


async def test_a_cursor_beyond_the_last_event_is_refused_and_harms_nothing(served: Served) -> None:
    served.gate.clear()
    generation = await served.start(PROMPT)
    with pytest.raises(ResumeExpired):
        await served.read(generation, 99)

    served.gate.set()
    assert await served.output(generation) == served.expected(PROMPT)


async def test_the_generation_ends_when_its_last_reader_leaves(served: Served) -> None:
    generation = await served.start(PROMPT, 100)
    async with aclosing(served.service.watch(DEFAULT_TENANT, generation, 0)) as batches:  # type: ignore[type-var]
        await anext(batches)
    await served.settled()

    assert served.fake.reason(generation) is FinishReason.CANCELLED
    assert served.fake.num_leaked == 0


async def test_another_tenants_generation_looks_like_none(served: Served) -> None:
    generation = await served.start(PROMPT, 2)
    missing = GenerationId("missing")

    async def refusal(asked: GenerationId) -> list[str]:
        messages = []
        for call in (served.service.get, served.service.cancel):
            with pytest.raises(GenerationNotFound) as info:
                await call(BLUE, asked)
            messages.append(info.value.message.replace(asked, "X"))
        with pytest.raises(GenerationNotFound) as info:
            await anext(aiter(served.service.watch(BLUE, asked, 0)))
        return [*messages, info.value.message.replace(asked, "X")]

    assert await refusal(generation) == await refusal(missing)
    assert await served.service.list_generations(BLUE) == ()


async def test_cancel_returns_the_record(served: Served) -> None:
    generation = await served.start(PROMPT, 100)
    record = await served.service.cancel(DEFAULT_TENANT, generation)

    assert record.state is GenerationState.CANCELLED
    assert (await served.service.get(DEFAULT_TENANT, generation)) == record
    assert (await served.service.list_generations(DEFAULT_TENANT)) == (record,)


async def test_keys_and_uploads_of_expired_generations_are_forgotten(served: Served) -> None:
    for number in range(200):
        generation = await served.open(request_id=f"r{number}")
        await served.service.cancel(DEFAULT_TENANT, generation)
        served.fake.clock.now += 1000
        served.fake.engine.tick()

    assert served.service._intake.num_known < 100
    assert len(served.service._keys) < 100


async def test_tokens_are_counted_for_text_and_ids(served: Served) -> None:
    service = served.service
    assert await service.count_tokens("fake", TextChunk(0, "hello")) == 5
    assert await service.count_tokens("fake", TokenChunk(0, packed(PROMPT))) == 20

    with pytest.raises(ModelNotFound):
        await service.count_tokens("other", TextChunk(0, "hello"))
    with pytest.raises(InvalidField):
        await service.count_tokens("fake", TokenChunk(0, packed([VOCAB_SIZE])))


async def test_an_estimate_says_whether_and_why_not(served: Served) -> None:
    good = await served.service.estimate(request(4, input_tokens=20))
    bad = await served.service.estimate(request(4, input_tokens=500))

    per_token = served.fake.spec.kv_bytes_per_token
    assert (good.is_admissible, good.reason) == (True, "")
    assert (good.kv_bytes, good.kv_bytes_left) == (24 * per_token, 64 * 4 * per_token)
    assert (bad.is_admissible, bad.reason) == (False, "CONTEXT_TOO_LONG")
    assert served.fake.engine.num_known == 0


async def test_ready_means_marked_and_no_rank_lost(served: Served) -> None:
    assert not (await served.service.status()).is_ready
    served.service.mark_ready()
    assert (await served.service.status()).is_ready

    served.fake.engine.lose_ring("rank 1 died")
    status = await served.service.status()
    assert (status.is_ready, status.detail) == (False, "rank 1 died")


async def test_status_tells_what_each_rank_holds(served: Served) -> None:
    served.gate.clear()
    await served.start(PROMPT[:8])
    await asyncio.sleep(0)
    status = await served.service.status()

    assert [(each.rank, each.node) for each in status.ranks] == [(0, "a"), (1, "b")]
    assert [each.num_blocks for each in status.ranks] == [32, 32]
    assert sum(each.num_blocks - each.num_free_blocks for each in status.ranks) == 3
    assert (status.num_running, status.num_waiting, status.num_ranks) == (1, 0, 2)


async def test_drain_refuses_new_requests_and_waits_for_the_others(served: Served) -> None:
    generation = await served.start(PROMPT, 20)
    await served.service.drain()

    assert served.fake.reason(generation) is FinishReason.LENGTH
    with pytest.raises(Draining):
        await served.open()


async def test_sixteen_streams_together_give_the_tokens_of_each_alone(served: Served) -> None:
    prompts = [
        [(7 * index + position) % 100 for position in range(3 * index + 1)] for index in range(16)
    ]
    generations = await asyncio.gather(*(served.start(prompt, 12) for prompt in prompts))
    outputs = await asyncio.gather(*(served.output(generation) for generation in generations))

    assert outputs == [served.expected(prompt, 12) for prompt in prompts]
    await served.settled()
    assert served.fake.num_leaked == 0


@pytest.mark.parametrize("seed", range(5))
async def test_random_cancels_in_every_phase_leave_nothing_behind(
    served: Served, seed: int
) -> None:
    dice = random.Random(seed)

    async def client(index: int) -> None:
        prompt = [dice.randrange(VOCAB_SIZE) for _ in range(dice.randint(1, 60))]
        try:
            generation = await served.open(dice.randint(1, 30))
            reading = asyncio.create_task(served.read(generation))
            for offset in range(0, len(prompt), 9):
                await served.send(generation, prompt[offset : offset + 9], offset)
                if dice.random() < 0.15:
                    await served.service.cancel(DEFAULT_TENANT, generation)
            await served.service.finish_prompt(generation, 0)
        except KvClusterError:
            await reading
            return
        for _ in range(dice.randint(0, 40)):
            await asyncio.sleep(0)
        match dice.randrange(3):
            case 0:
                await served.service.cancel(DEFAULT_TENANT, generation)
                await reading
            case 1:
                reading.cancel()
                await asyncio.wait({reading})
            case 2:
                await reading

    for _ in range(4):
        await asyncio.gather(*(client(index) for index in range(10)))
    await served.settled()

    assert served.fake.num_leaked == 0
    assert served.fake.engine.num_unfinished == 0
