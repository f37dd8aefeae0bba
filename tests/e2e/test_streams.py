"""Many streams at once give what each gives alone, whatever their lengths and settings."""

import asyncio
import random

from kvcluster.client import Client, GenerateOptions
from kvcluster.engine.api import Admitted, Finished, Output
from tests.architectures import VOCAB_SIZE
from tests.e2e.conftest import Cluster

LENGTHS = (1, 2, 7, 8, 9, 30, 39, 40, 41, 64, 90, 120, 150, 200, 260, 333)


def prompt(length: int) -> list[int]:
    choice = random.Random(length)
    return [choice.randrange(3, VOCAB_SIZE) for _ in range(length)]


async def output_of(client: Client, length: int, **options: object) -> list[int]:
    wanted = GenerateOptions(max_output_tokens=12, ignore_eos=True, **options)  # type: ignore[typeddict-item]
    return [
        token_id
        async for event in client.generate(prompt_ids=prompt(length), **wanted)
        if isinstance(event.event, Output)
        for token_id in event.event.token_ids
    ]


async def test_sixteen_streams_at_once_give_what_each_gives_alone(cluster: Cluster) -> None:
    async with Client(cluster.address) as client:
        alone = [await output_of(client, length) for length in LENGTHS]

        together = await asyncio.gather(*(output_of(client, length) for length in LENGTHS))

    assert together == alone
    assert all(len(tokens) == 12 for tokens in alone)


async def test_seeded_sampling_does_not_depend_on_the_company(cluster: Cluster) -> None:
    async with Client(cluster.address) as client:
        alone = [
            await output_of(client, length, temperature=0.9, top_p=0.9, seed=length)
            for length in LENGTHS
        ]

        together = await asyncio.gather(
            *(
                output_of(client, length, temperature=0.9, top_p=0.9, seed=length)
                for length in LENGTHS
            )
        )

    assert together == alone


async def test_events_are_gap_free_and_end_with_finished(cluster: Cluster) -> None:
    async with Client(cluster.address) as client:
        events = [
            event
            async for event in client.generate(
                prompt_ids=prompt(100), max_output_tokens=5, ignore_eos=True
            )
        ]

    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert isinstance(events[0].event, Admitted)
    assert isinstance(events[-1].event, Finished)
    assert events[-1].event.usage.input_tokens == 100
    assert events[-1].event.usage.output_tokens == 5


async def test_a_finished_generation_can_be_replayed_from_anywhere(cluster: Cluster) -> None:
    async with Client(cluster.address) as client:
        events = [
            event
            async for event in client.generate(
                prompt_ids=prompt(50), max_output_tokens=5, ignore_eos=True
            )
        ]
        for after in range(len(events) + 1):
            replayed = [
                event async for event in client.resume(events[0].generation, after_sequence=after)
            ]
            assert replayed == events[after:]


async def test_nothing_is_held_when_all_have_finished(cluster: Cluster) -> None:
    async with Client(cluster.address) as client:
        await asyncio.gather(*(output_of(client, length) for length in LENGTHS))

    assert await cluster.num_used_blocks() == 0
