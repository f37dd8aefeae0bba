"""However and whenever a request ends early, nothing of it stays anywhere."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest

from kvcluster.client import Client
from kvcluster.engine.api import Finished, FinishReason, GenerationEvent, Output
from kvcluster.errors import DeadlineExceeded, KvClusterError
from tests.architectures import VOCAB_SIZE
from tests.e2e.conftest import Cluster

NUM_CANCELS = 200
CONCURRENCY = 8

Ending = Callable[[Client, Cluster, random.Random], Awaitable[None]]


def prompt(choice: random.Random) -> list[int]:
    return [choice.randrange(3, VOCAB_SIZE) for _ in range(choice.choice((1, 20, 60, 200, 400)))]


def generate(client: Client, choice: random.Random) -> AsyncIterator[GenerationEvent]:
    return client.generate(
        prompt_ids=prompt(choice), max_output_tokens=100, ignore_eos=True, progress_interval_s=0.01
    )


async def stop_reading(client: Client, cluster: Cluster, choice: random.Random) -> None:
    """The RPC is cancelled after some events: queued, uploading, prefilling or decoding."""
    left = choice.randrange(0, 12)
    async with aclosing(generate(client, choice)) as events:
        async for _ in events:
            left -= 1
            if left < 0:
                return


async def cancel_by_name(client: Client, cluster: Cluster, choice: random.Random) -> None:
    left = choice.randrange(0, 12)
    async for event in generate(client, choice):
        left -= 1
        if left == 0:
            await client.cancel(event.generation)
        if isinstance(event.event, Finished):
            assert event.event.reason in (FinishReason.CANCELLED, FinishReason.LENGTH)


async def run_out_of_time(client: Client, cluster: Cluster, choice: random.Random) -> None:
    try:
        async for _ in client.generate(
            prompt_ids=prompt(choice),
            max_output_tokens=100,
            ignore_eos=True,
            timeout_s=choice.uniform(0.001, 0.1),
        ):
            pass
    except (DeadlineExceeded, KvClusterError):
        return


async def disconnect(client: Client, cluster: Cluster, choice: random.Random) -> None:
    """The whole connection goes away in the middle."""
    left = choice.randrange(0, 12)
    lost = Client(cluster.address)
    try:
        async for _ in generate(lost, choice):
            left -= 1
            if left < 0:
                break
    finally:
        await lost.close()


async def break_off_the_upload(client: Client, cluster: Cluster, choice: random.Random) -> None:
    async def chunks() -> AsyncIterator[list[int]]:
        for _ in range(choice.randrange(0, 4)):
            yield prompt(choice)[:90]
        raise ConnectionResetError("the source of the prompt is gone")

    with pytest.raises(ConnectionResetError):
        async for _ in client.generate(prompt_ids=chunks(), max_output_tokens=100):
            pass


ENDINGS: tuple[Ending, ...] = (
    stop_reading,
    cancel_by_name,
    run_out_of_time,
    disconnect,
    break_off_the_upload,
)


async def test_two_hundred_random_ends_leave_nothing_behind(cluster: Cluster) -> None:
    choice = random.Random(20)
    turns = asyncio.Semaphore(CONCURRENCY)
    async with Client(cluster.address) as client:
        async for _ in generate(client, choice):
            pass
        await cluster.until_nothing_is_left()
        tasks_before = len(asyncio.all_tasks())

        async def end_early(seed: int) -> None:
            async with turns:
                own_choice = random.Random(seed)
                await own_choice.choice(ENDINGS)(client, cluster, own_choice)

        await asyncio.gather(*(end_early(seed) for seed in range(NUM_CANCELS)))

        await cluster.until_nothing_is_left()
        async with asyncio.timeout(30):
            while len(asyncio.all_tasks()) > tasks_before:
                await asyncio.sleep(0.005)


async def test_a_stream_beside_the_cancelled_ones_is_not_disturbed(cluster: Cluster) -> None:
    ids = [5, 6, 7] * 30
    async with Client(cluster.address) as client:

        async def steady() -> list[int]:
            return [
                token_id
                async for event in client.generate(
                    prompt_ids=ids, max_output_tokens=60, ignore_eos=True
                )
                if isinstance(event.event, Output)
                for token_id in event.event.token_ids
            ]

        alone = await steady()
        beside = asyncio.create_task(steady())
        for seed in range(20):
            own_choice = random.Random(seed)
            await own_choice.choice(ENDINGS)(client, cluster, own_choice)

        assert await beside == alone
