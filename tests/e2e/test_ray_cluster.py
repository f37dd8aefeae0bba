"""`kvcluster serve` on a Ray cluster of two nodes, from outside: its port, processes and stdout.

One server for all tests, because a start takes half a minute on two cores. The last tests stop it.
"""

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from kvcluster.client import Client
from kvcluster.engine.api import GenerationEvent, GenerationState, Output
from kvcluster.errors import RankLost
from tests.architectures import VOCAB_SIZE, tiny_models
from tests.e2e.test_cancellation import ENDINGS

Greedy = Callable[[int, int], list[int]]
"""Length of the prompt and number of tokens: what transformers goes on with."""

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_RANKS = 3
NUM_CANCELS = 60
CONCURRENCY = 8
STREAM_LENGTHS = (1, 2, 7, 8, 9, 30, 39, 40, 41, 64, 90, 120, 150, 200, 260, 333)
SETTINGS = (
    "cache.block_size=8",
    "cache.capacity_tokens=512",
    "engine.prefill_chunk_tokens=48",
    "engine.shard_min_tokens=40",
    "engine.step_timeout_s=30",
    "ring.placement=SPREAD",
)
NODES = """
import sys
from kvcluster.cluster.simulated_nodes import simulated_nodes
with simulated_nodes(2, cpus_per_node=2) as cluster:
    print(cluster.address, flush=True)
    sys.stdin.read()
"""
"""A process of its own: Ray is connected to one cluster per process, and other tests have theirs.
Ends when its stdin does."""


@dataclass(frozen=True)
class Server:
    """A running `kvcluster serve`, with the Ray cluster that it runs on."""

    address: str
    first_line: str
    process: "subprocess.Popen[str]"
    nodes: psutil.Process

    def actors(self) -> dict[psutil.Process, str]:
        """Every process in which Ray runs an actor, with its title."""
        found = {}
        for process in self.nodes.children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if title.startswith(("ray::Worker", "ray::Serve")):
                found[process] = title
        return found

    def ranks(self, *, leader: bool) -> list[psutil.Process]:
        """The workers that lead or follow: Ray's titles say what an actor is running."""
        return [
            process
            for process, title in self.actors().items()
            if title.startswith("ray::Worker") and leader is not (".follow" in title)
        ]


@dataclass(frozen=True)
class Drained:
    """What a server left when it was asked to stop in the middle of a generation."""

    output: list[int]
    exit_code: int
    stdout: str
    actors: dict[psutil.Process, str]


@contextmanager
def ray_nodes() -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of a Ray cluster of two nodes."""
    with subprocess.Popen(
        [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.stdin.close()
            process.wait(30)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Gemma 2: windowed and full layers, soft-caps."""
    return tiny_models()["gemma2"]()


@pytest.fixture(scope="module")
def server(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("tiny-gemma2")
    model.save_pretrained(directory)
    with ray_nodes() as (ray_address, nodes):
        command = [
            *(Path(sys.executable).with_name("kvcluster"), "serve", "--json", "--insecure-local"),
            *("--listen", "127.0.0.1:0", "--ray-address", ray_address),
            *("--model", directory, "--ranks", str(NUM_RANKS)),
            *(part for setting in SETTINGS for part in ("--set", setting)),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                first_line = process.stdout.readline()
                assert first_line, f"exit code {process.wait(30)}"
                yield Server(json.loads(first_line)["listen"], first_line, process, nodes)
            finally:
                process.kill()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with Client(server.address) as client:
        yield client


@pytest.fixture
def greedy(model: PreTrainedModel) -> Greedy:
    """What transformers goes on with after the prompt of a length."""

    @cache
    def tokens(length: int, num_tokens: int) -> list[int]:
        model.set_attn_implementation("eager")
        ids = torch.tensor([prompt(length)])
        with torch.inference_mode():
            for _ in range(num_tokens):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids[0, length:].tolist()

    return tokens


@pytest.fixture(scope="module")
def drained(server: Server) -> Drained:
    """The server after SIGTERM: no later test has one."""
    output = asyncio.run(terminate_while_generating(server))
    rest, _ = server.process.communicate(timeout=60)
    return Drained(
        output=output,
        exit_code=server.process.returncode,
        stdout=server.first_line + rest,
        actors=asyncio.run(actors_that_stay(server)),
    )


def prompt(length: int) -> list[int]:
    choice = random.Random(length)
    return [choice.randrange(3, VOCAB_SIZE) for _ in range(length)]


def generate(client: Client, length: int, num_tokens: int) -> AsyncIterator[GenerationEvent]:
    return client.generate(prompt_ids=prompt(length), max_output_tokens=num_tokens, ignore_eos=True)


async def output_of(client: Client, length: int, num_tokens: int = 12) -> list[int]:
    return [
        token_id
        async for event in generate(client, length, num_tokens)
        if isinstance(event.event, Output)
        for token_id in event.event.token_ids
    ]


async def until(holds: Callable[[], Awaitable[bool]], *, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not await holds():
            await asyncio.sleep(0.05)


async def kv_bytes_left(client: Client) -> int:
    return (await client.estimate(input_tokens=1)).kv_bytes_left


async def has_none_unfinished(client: Client) -> bool:
    unfinished = (GenerationState.QUEUED, GenerationState.RUNNING)
    return not [record async for record in client.list() if record.state in unfinished]


async def until_not_serving(client: Client) -> None:
    async def is_down() -> bool:
        return not await client.health()

    await until(is_down, timeout_s=10)


async def kill_in_the_middle(client: Client, rank: psutil.Process) -> None:
    """Read a long generation, and kill a rank once tokens come."""
    is_killed = False
    async for event in generate(client, 100, 400):
        if isinstance(event.event, Output) and not is_killed:
            rank.kill()
            is_killed = True


async def terminate_while_generating(server: Server) -> list[int]:
    output: list[int] = []
    async with Client(server.address) as client:
        async for event in generate(client, 20, 400):
            if isinstance(event.event, Output):
                if not output:
                    server.process.send_signal(signal.SIGTERM)
                output += event.event.token_ids
    return output


async def actors_that_stay(server: Server) -> dict[psutil.Process, str]:
    """Ray's own controller of deployments belongs to the cluster, which goes on."""

    def remaining() -> dict[psutil.Process, str]:
        return {
            process: title
            for process, title in server.actors().items()
            if not title.startswith("ray::ServeController")
        }

    async def is_empty() -> bool:
        return not remaining()

    try:
        await until(is_empty, timeout_s=20)
    except TimeoutError:
        return remaining()
    return {}


async def test_a_started_server_is_healthy(client: Client) -> None:
    assert await client.health()


def test_the_ranks_are_spread_over_the_nodes(server: Server) -> None:
    raylets = {
        rank.ppid() for is_leader in (True, False) for rank in server.ranks(leader=is_leader)
    }

    assert len(server.ranks(leader=True)) == 1
    assert len(server.ranks(leader=False)) == NUM_RANKS - 1
    assert len(raylets) == 2


@pytest.mark.parametrize("length", [1, 20, 100, 300])
async def test_tokens_are_those_of_transformers(
    length: int, client: Client, greedy: Greedy
) -> None:
    assert await output_of(client, length, 24) == greedy(length, 24)


async def test_sixteen_streams_at_once_give_what_each_gives_alone(client: Client) -> None:
    alone = [await output_of(client, length) for length in STREAM_LENGTHS]

    together = await asyncio.gather(*(output_of(client, length) for length in STREAM_LENGTHS))

    assert together == alone
    assert all(len(tokens) == 12 for tokens in alone)


async def test_random_ends_leave_no_block_generation_or_process(
    server: Server, client: Client, greedy: Greedy
) -> None:
    bytes_before = await kv_bytes_left(client)
    actors_before = server.actors().keys()
    turns = asyncio.Semaphore(CONCURRENCY)

    async def end_early(seed: int) -> None:
        async with turns:
            choice = random.Random(seed)
            await choice.choice(ENDINGS)(client, server, choice)

    async def is_free() -> bool:
        return await has_none_unfinished(client) and await kv_bytes_left(client) == bytes_before

    await asyncio.gather(*(end_early(seed) for seed in range(NUM_CANCELS)))

    await until(is_free, timeout_s=30)
    assert server.actors().keys() == actors_before
    assert await output_of(client, 100, 24) == greedy(100, 24)


async def test_a_killed_rank_ends_its_streams_and_is_replaced(
    server: Server, client: Client, greedy: Greedy
) -> None:
    bytes_before = await kv_bytes_left(client)

    with pytest.raises(RankLost):
        async with asyncio.timeout(20):
            await kill_in_the_middle(client, server.ranks(leader=False)[0])

    await until_not_serving(client)
    with pytest.raises(RankLost):
        async with asyncio.timeout(10):
            await output_of(client, 1)
    await until(client.health, timeout_s=60)
    assert await output_of(client, 100, 24) == greedy(100, 24)
    assert await kv_bytes_left(client) == bytes_before
    assert len(server.ranks(leader=True)) == 1
    assert len(server.ranks(leader=False)) == NUM_RANKS - 1


async def test_a_rank_killed_while_nothing_runs_is_replaced(
    server: Server, client: Client, greedy: Greedy
) -> None:
    server.ranks(leader=True)[0].kill()

    await until_not_serving(client)
    await until(client.health, timeout_s=60)
    assert await output_of(client, 100, 24) == greedy(100, 24)


def test_a_generation_that_runs_at_sigterm_gets_all_its_tokens(
    drained: Drained, greedy: Greedy
) -> None:
    assert drained.output == greedy(20, 400)


def test_a_drained_server_exits_with_success(drained: Drained) -> None:
    assert drained.exit_code == 0


def test_a_stopped_server_leaves_no_actor_on_the_ray_cluster(drained: Drained) -> None:
    assert drained.actors == {}


def test_stdout_is_exactly_one_json_object(drained: Drained, server: Server) -> None:
    ready = json.loads(drained.stdout)

    assert ready["listen"] == server.address
    assert ready["num_ranks"] == NUM_RANKS
