"""A client that sends a call again with its request_id: one generation, or a clear refusal."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import pytest

from kvcluster.client import Client
from kvcluster.engine.api import Admitted, Output
from kvcluster.errors import DeadlineExceeded, RankLost, RequestIdConflict
from kvcluster.types import DEFAULT_TENANT
from tests.architectures import VOCAB_SIZE
from tests.e2e.conftest import Cluster

PROMPT = [3 + 7 * index % (VOCAB_SIZE - 3) for index in range(400)]
OTHER = [*PROMPT[:-1], PROMPT[-1] + 1]
NUM_RETRIES = 20
BOUND_S = 30.0


async def cut(
    ids: Sequence[int], size: int, *, pause: asyncio.Event | None = None, pause_at: int = 0
) -> AsyncIterator[list[int]]:
    """`ids` in chunks of `size`; waits for `pause` before the chunk that begins at `pause_at`."""
    for start in range(0, len(ids), size):
        if pause is not None and start == pause_at:
            await pause.wait()
        yield list(ids[start : start + size])


async def answer(
    client: Client, prompt_ids: AsyncIterator[list[int]] | list[int], **options: object
) -> tuple[str, list[int]]:
    """The generation's name and its output."""
    name = ""
    tokens: list[int] = []
    async with asyncio.timeout(BOUND_S):
        events = client.generate(
            prompt_ids=prompt_ids,
            **{"max_output_tokens": 8, "ignore_eos": True, **options},  # type: ignore[arg-type]
        )
        async for event in events:
            name = event.generation
            if isinstance(event.event, Output):
                tokens += event.event.token_ids
    return name, tokens


async def until_uploaded(cluster: Cluster, num_tokens: int) -> None:
    """Return once the engine holds so many prompt tokens of the newest generation."""
    async with asyncio.timeout(BOUND_S):
        while True:
            records = await cluster.service.list_generations(DEFAULT_TENANT)
            if records and records[0].usage.input_tokens == num_tokens:
                return
            await asyncio.sleep(0.002)


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[Client]:
    async with Client(cluster.address) as made:
        yield made


async def test_twenty_calls_with_one_request_id_are_one_generation(client: Client) -> None:
    _, alone = await answer(client, PROMPT)

    answers = await asyncio.gather(
        *(
            answer(client, cut(PROMPT, 40 + 13 * number), request_id="once")
            for number in range(NUM_RETRIES)
        )
    )

    assert len({name for name, _ in answers}) == 1
    assert [tokens for _, tokens in answers] == [alone] * NUM_RETRIES


async def test_a_late_retry_gets_the_answer_of_the_first(client: Client) -> None:
    first = await answer(client, cut(PROMPT, 64), request_id="late")

    assert await answer(client, cut(PROMPT, 50), request_id="late") == first


async def paused_upload(
    client: Client, cluster: Cluster, num_tokens: int
) -> "tuple[asyncio.Task[tuple[str, list[int]]], asyncio.Event]":
    """Request `r`, which has sent so many tokens of PROMPT and sends the rest after the event."""
    pause = asyncio.Event()
    upload = asyncio.create_task(
        answer(client, cut(PROMPT, 100, pause=pause, pause_at=num_tokens), request_id="r")
    )
    await until_uploaded(cluster, num_tokens)
    return upload, pause


async def test_a_retry_that_differs_is_refused_and_the_first_is_undisturbed(
    client: Client, cluster: Cluster
) -> None:
    _, alone = await answer(client, PROMPT)
    first, pause = await paused_upload(client, cluster, 200)
    retry = asyncio.create_task(answer(client, cut(OTHER, 70), request_id="r"))
    pause.set()

    with pytest.raises(RequestIdConflict):
        await retry
    assert (await first)[1] == alone


@pytest.mark.parametrize("ids", [OTHER, PROMPT[:300], [*PROMPT, 5]])
async def test_a_late_retry_with_another_prompt_is_refused(client: Client, ids: list[int]) -> None:
    await answer(client, cut(PROMPT, 100), request_id="r")

    with pytest.raises(RequestIdConflict):
        await answer(client, cut(ids, 90), request_id="r")


async def test_a_shorter_retry_beside_the_first_is_refused_and_nothing_is_cut_off(
    client: Client, cluster: Cluster
) -> None:
    _, alone = await answer(client, PROMPT)
    first, pause = await paused_upload(client, cluster, 300)

    with pytest.raises(RequestIdConflict):
        await answer(client, cut(PROMPT[:200], 50), request_id="r")
    pause.set()
    assert (await first)[1] == alone


async def test_a_retry_takes_over_when_the_first_client_is_gone(
    client: Client, cluster: Cluster
) -> None:
    _, alone = await answer(client, PROMPT)
    first, _ = await paused_upload(client, cluster, 200)
    retry = asyncio.create_task(answer(client, cut(PROMPT, 70), request_id="r"))
    name = (await cluster.service.list_generations(DEFAULT_TENANT))[0].generation
    async with asyncio.timeout(BOUND_S):
        while not cluster.service._intake.find(name).has_retries:
            await asyncio.sleep(0.002)
    first.cancel()

    assert (await retry)[1] == alone


async def test_a_retry_after_a_failure_is_a_fresh_generation(
    client: Client, cluster: Cluster
) -> None:
    first = asyncio.create_task(answer(client, PROMPT, request_id="r", max_output_tokens=60))
    await until_uploaded(cluster, 400)
    failed = (await cluster.service.list_generations(DEFAULT_TENANT))[0].generation
    cluster.service._engine.fail(
        failed, RankLost("rank 1 was lost", metadata={"rank": "1"}, retry_after_s=2.0)
    )
    with pytest.raises(RankLost) as raised:
        await first
    assert (raised.value.metadata["rank"], raised.value.retry_after_s) == ("1", 2.0)

    again, tokens = await answer(client, PROMPT, request_id="r", max_output_tokens=60)

    _, alone = await answer(client, PROMPT)
    assert failed not in again
    assert tokens[:8] == alone


async def test_a_retry_after_the_deadline_is_a_fresh_generation(client: Client) -> None:
    stuck = cut(PROMPT, 100, pause=asyncio.Event(), pause_at=200)
    with pytest.raises(DeadlineExceeded):
        await answer(client, stuck, request_id="r", timeout_s=0.3)

    _, tokens = await answer(client, cut(PROMPT, 100), request_id="r")

    assert tokens == (await answer(client, PROMPT))[1]


async def test_a_retry_after_a_disconnect_is_a_fresh_generation(
    client: Client, cluster: Cluster
) -> None:
    options = {"request_id": "r", "max_output_tokens": 100, "ignore_eos": True}
    async with aclosing(client.generate(prompt_ids=PROMPT, **options)) as events:  # type: ignore[arg-type]
        async for event in events:
            if not isinstance(event.event, Admitted):
                break
    async with asyncio.timeout(BOUND_S):
        while (await cluster.service.status()).num_running:
            await asyncio.sleep(0.005)

    again, tokens = await answer(client, PROMPT, request_id="r", max_output_tokens=100)

    assert again != event.generation
    assert len(tokens) == 100


async def test_a_retry_after_an_explicit_cancel_stays_cancelled(client: Client) -> None:
    options = {"request_id": "r", "max_output_tokens": 100, "ignore_eos": True}
    cancelled = ""
    async for event in client.generate(prompt_ids=PROMPT, **options):  # type: ignore[arg-type]
        if isinstance(event.event, Output) and not cancelled:
            cancelled = event.generation
            await client.cancel(cancelled)

    name, _ = await answer(client, PROMPT, request_id="r", max_output_tokens=100)

    assert name == cancelled
