"""Retries with a request_id: one generation, compared prompts, and nobody hangs."""

import asyncio
from contextlib import aclosing

import pytest

from kvcluster.engine import upload as uploads
from kvcluster.engine.api import (
    FinishReason,
    Opened,
    TextChunk,
)
from kvcluster.errors import (
    GenerationNotFound,
    PromptCorrupt,
    RankLost,
    RequestIdConflict,
    UploadStalled,
)
from kvcluster.types import DEFAULT_TENANT
from tests.fake_engine import (
    FakeCluster,
    model_spec,
    request,
)
from tests.unit.engine.serving import BLUE, PROMPT, Served, serve


async def test_a_retry_attaches_and_its_equal_prompt_is_not_run_again(served: Served) -> None:
    generation = await served.start(PROMPT, request_id="r", deadline_s=50.0)
    again = await served.service.open(request(request_id="r", deadline_s=49.0))
    assert again == Opened(generation=generation, upload=1)

    for offset in (0, 13):
        await served.send(generation, PROMPT[offset : offset + 13], offset, upload=1)
    await served.service.finish_prompt(generation, 1)

    assert await served.output(generation) == served.expected(PROMPT)
    assert served.fake.engine.num_known == 1


async def test_a_retry_beside_the_first_upload_waits_for_it(served: Served) -> None:
    generation = await served.open(request_id="r")
    await served.send(generation, PROMPT[:8])
    upload = await served.retry()
    retry = asyncio.create_task(served.resend(generation, PROMPT, upload))
    await asyncio.sleep(0)
    assert not retry.done()

    await served.send(generation, PROMPT[8:], 8)
    await served.service.finish_prompt(generation, 0)
    await retry

    assert await served.output(generation) == served.expected(PROMPT)


async def test_many_retries_cut_differently_are_all_accepted(served: Served) -> None:
    generation = await served.open(request_id="r")

    async def upload(number: int) -> None:
        for start in range(0, len(PROMPT), number + 1):
            await served.send(generation, PROMPT[start : start + number + 1], start, upload=number)
        await served.service.finish_prompt(generation, number)

    numbers = [0, *[await served.retry() for _ in range(30)]]
    await asyncio.gather(*(upload(number) for number in numbers))

    assert await served.output(generation) == served.expected(PROMPT)


async def test_two_texts_that_start_together_are_one_prompt(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded in a thread: the second upload comes while the first is in the middle of it."""
    monkeypatch.setattr(uploads, "THREAD_MIN_CHARS", 1)
    generation = await served.open(request_id="r")
    again = await served.retry()

    async def upload(number: int) -> None:
        await served.service.append_prompt(generation, number, TextChunk(0, "hello world"))
        await served.service.finish_prompt(generation, number)

    await asyncio.gather(upload(0), upload(again))

    expected = served.expected([ord(character) for character in "hello world"])
    assert await served.output(generation) == expected


@pytest.mark.parametrize("reached", [0, 3, 8, 13])
async def test_a_retry_takes_over_when_the_first_upload_is_gone(
    served: Served, reached: int
) -> None:
    generation = await served.open(request_id="r")
    if reached:
        await served.send(generation, PROMPT[:reached])
    upload = await served.retry()
    retry = asyncio.create_task(served.resend(generation, PROMPT, upload))
    await asyncio.sleep(0)

    await served.service.fail(generation, 0, "UploadStalled", "client gone")
    await retry

    assert await served.output(generation) == served.expected(PROMPT)


async def test_a_text_retry_takes_over_between_two_characters(served: Served) -> None:
    generation = await served.open(request_id="r")
    await served.service.append_prompt(generation, 0, TextChunk(0, "hello "))
    upload = await served.retry()
    await served.service.fail(generation, 0, "UploadStalled", "client gone")

    await served.service.append_prompt(generation, upload, TextChunk(0, "hello world"))
    await served.service.finish_prompt(generation, upload)

    expected = served.expected([ord(character) for character in "hello world"])
    assert await served.output(generation) == expected


async def test_a_retry_that_differs_does_not_take_over(served: Served) -> None:
    generation = await served.open(request_id="r")
    await served.send(generation, PROMPT[:8])
    upload = await served.retry()
    await served.service.fail(generation, 0, "UploadStalled", "client gone")

    with pytest.raises(RequestIdConflict):
        await served.resend(generation, [9, *PROMPT[1:]], upload)
    assert served.fake.reason(generation) is FinishReason.ERROR


async def test_a_first_upload_that_is_corrupt_leaves_its_place_to_the_retry(
    served: Served,
) -> None:
    generation = await served.open(request_id="r")
    upload = await served.retry()
    with pytest.raises(PromptCorrupt):
        await served.send(generation, PROMPT, 5)

    await served.resend(generation, PROMPT, upload)

    assert await served.output(generation) == served.expected(PROMPT)


async def test_an_upload_that_went_silent_is_replaced_and_stays_so() -> None:
    fake = FakeCluster(spec=model_spec(eos_token_ids=()))
    async for served in serve(fake, feeder_silence_s=0.02):
        generation = await served.open(request_id="r")
        await served.send(generation, PROMPT[:8])
        await served.resend(generation, PROMPT, await served.retry())

        with pytest.raises(UploadStalled):
            await served.send(generation, PROMPT[8:], 8)
        assert await served.output(generation) == served.expected(PROMPT)


async def test_retries_of_an_upload_that_ends_hear_of_it(served: Served) -> None:
    generation = await served.open(request_id="r")
    retry = asyncio.create_task(served.resend(generation, PROMPT, await served.retry()))
    await asyncio.sleep(0)

    await served.service.cancel(DEFAULT_TENANT, generation)

    with pytest.raises(GenerationNotFound, match="cancelled"):
        await retry


async def test_the_same_key_with_another_body_is_a_conflict(served: Served) -> None:
    await served.start(PROMPT, request_id="r")

    with pytest.raises(RequestIdConflict, match="another body"):
        await served.service.open(request(5, request_id="r"))


@pytest.mark.parametrize("ids", [[9] * 20, PROMPT[:19], [*PROMPT, 1]])
async def test_the_same_key_with_another_prompt_is_a_conflict_for_the_retry_alone(
    served: Served, ids: list[int]
) -> None:
    generation = await served.start(PROMPT, 30, request_id="r")
    upload = await served.retry(30)
    with pytest.raises(RequestIdConflict, match="another prompt"):
        await served.resend(generation, ids, upload)
    await served.service.fail(generation, upload, "RequestIdConflict", "as the router would")

    assert await served.output(generation) == served.expected(PROMPT, 30)


async def test_a_shorter_retry_never_cuts_off_the_first(served: Served) -> None:
    generation = await served.open(request_id="r")
    await served.send(generation, PROMPT[:15])
    with pytest.raises(RequestIdConflict):
        await served.resend(generation, PROMPT[:10], await served.retry())
    await served.send(generation, PROMPT[15:], 15)
    await served.service.finish_prompt(generation, 0)

    assert await served.output(generation) == served.expected(PROMPT)


async def test_two_tenants_may_use_one_key(served: Served) -> None:
    generation = await served.start(PROMPT, request_id="r")

    other = await served.service.open(request(request_id="r", tenant=BLUE))

    assert other.generation != generation
    assert not other.is_attached


async def test_a_key_is_free_again_when_the_upload_failed(served: Served) -> None:
    generation = await served.open(request_id="r")
    await served.send(generation, PROMPT[:5])
    await served.service.fail(generation, 0, "UploadStalled", "no chunk for 60 s")

    again = await served.service.open(request(7, request_id="r"))

    assert again.generation != generation
    assert not again.is_attached


async def test_a_key_outlives_a_cancelled_generation_whose_prompt_was_complete(
    served: Served,
) -> None:
    generation = await served.start(PROMPT, 100, request_id="r")
    await served.service.cancel(DEFAULT_TENANT, generation)

    assert (await served.service.open(request(100, request_id="r"))).is_attached


async def test_a_key_outlives_an_answer_and_is_free_after_a_failure(served: Served) -> None:
    generation = await served.start(PROMPT, request_id="r")
    await served.settled()
    assert (await served.service.open(request(request_id="r"))).is_attached

    lost = await served.start(PROMPT, 100, request_id="s")
    served.fake.engine.fail(lost, RankLost("rank 1 died"))
    again = await served.start(PROMPT, 100, request_id="s")

    assert again not in (generation, lost)
    assert await served.output(again) == served.expected(PROMPT, 100)


async def test_a_key_is_free_after_the_deadline(served: Served) -> None:
    served.gate.clear()
    late = await served.start(PROMPT, request_id="r", deadline_s=1.0)
    served.fake.clock.now += 2
    served.fake.engine.tick()
    assert served.fake.reason(late) is FinishReason.DEADLINE

    assert not (await served.service.open(request(request_id="r"))).is_attached


async def test_a_key_is_free_after_its_readers_left(served: Served) -> None:
    generation = await served.start(PROMPT, 100, request_id="r")
    async with aclosing(served.service.watch(DEFAULT_TENANT, generation, 0)) as batches:  # type: ignore[type-var]
        await anext(batches)
    await served.settled()

    assert not (await served.service.open(request(100, request_id="r"))).is_attached
