"""Ray places the ranks, runs plans on them, and a lost rank is a named error, not a hang."""

import asyncio
import gc
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from kvcluster.cluster.ring_group import RingGroup
from kvcluster.cluster.worker import Worker
from kvcluster.config import (
    CacheConfig,
    ClusterConfig,
    EngineConfig,
    RingConfig,
    TransportKind,
)
from kvcluster.engine.plan import NewBlock, SequenceStart, SequenceStep, StepPlan
from kvcluster.errors import ConfigError, ModelNotFound, RankLost
from kvcluster.model.loader import load_model
from kvcluster.types import Policy, Route, SamplingParams
from tests.architectures import VOCAB_SIZE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("two_nodes")]

BLOCK_SIZE = 16
PROMPT = [(7 * i + 3) % VOCAB_SIZE for i in range(70)]


def cluster_config(model: Path, *, num_ranks: int, **ring: object) -> ClusterConfig:
    return ClusterConfig(
        model=str(model),
        cache=CacheConfig(block_size=BLOCK_SIZE, capacity_tokens=256),
        engine=EngineConfig(step_timeout_s=30),
        ring=RingConfig(num_ranks=num_ranks, **ring),  # type: ignore[arg-type]
    )


@asynccontextmanager
async def started(config: ClusterConfig) -> AsyncIterator[RingGroup]:
    group = RingGroup(config)
    try:
        await group.start()
        yield group
    finally:
        await group.stop()


def prefill(num_ranks: int, route: Route = Route.PASS_KV) -> StepPlan:
    blocks = tuple(
        NewBlock(index % num_ranks, (index, index + 1))
        for index in range(-(-len(PROMPT) // BLOCK_SIZE))
    )
    part = SequenceStep(
        sequence=1,
        start=0,
        num_tokens=len(PROMPT),
        token_ids=array("I", PROMPT).tobytes(),
        appended=blocks,
        num_prompt_tokens=len(PROMPT),
        samples=True,
        route=route,
    )
    return StepPlan(1, 1, (SequenceStart(1, SamplingParams(), Policy()),), (part,))


def decode(step: int) -> StepPlan:
    start = len(PROMPT) + step - 2
    part = SequenceStep(
        sequence=1,
        start=start,
        num_tokens=1,
        token_ids=b"",
        appended=(),
        num_prompt_tokens=len(PROMPT),
        samples=True,
    )
    return StepPlan(1, step, (), (part,))


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> list[int]:
    """What transformers goes on with."""
    model = load_model(str(tiny_model_dir), dtype="float32", device="cpu")
    model.module.set_attn_implementation("eager")
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        for _ in range(4):
            ids = torch.cat([ids, model.module(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("num_ranks", "placement", "transport"),
    [
        (1, "PACK", TransportKind.AUTO),
        (3, "PACK", TransportKind.SOCKETS),
        (4, "SPREAD", TransportKind.SOCKETS),
        (3, "SPREAD", TransportKind.GLOO),
    ],
)
async def test_ranks_in_actors_go_on_as_transformers_does(
    num_ranks: int,
    placement: str,
    transport: TransportKind,
    tiny_model_dir: Path,
    expected: list[int],
) -> None:
    config = cluster_config(
        tiny_model_dir, num_ranks=num_ranks, placement=placement, transport=transport
    )
    async with started(config) as group:
        plans = [prefill(num_ranks), *(decode(step) for step in (2, 3, 4))]
        results = await asyncio.gather(*(group.execute(plan) for plan in plans))

        assert [result.sampled[0].token_id for result in results] == expected
        assert len(set(group.nodes)) == (2 if placement == "SPREAD" else 1)


async def test_a_killed_rank_is_rank_lost(tiny_model_dir: Path) -> None:
    async with started(cluster_config(tiny_model_dir, num_ranks=3)) as group:
        await group.execute(prefill(3))

        ray.kill(group.workers[2])

        with pytest.raises(RankLost):
            await group.execute(decode(2))


async def test_a_plan_out_of_order_ends_the_epoch(tiny_model_dir: Path) -> None:
    async with started(cluster_config(tiny_model_dir, num_ranks=2)) as group:
        await group.execute(prefill(2))

        with pytest.raises(RankLost, match="expected step 2 of epoch 1, got step 3"):
            await group.execute(decode(3))


class CountingWorker(Worker):
    def num_not_searched(self) -> int:
        return gc.get_freeze_count()


async def test_warm_ranks_are_not_searched_for_garbage_and_go_on(tiny_model_dir: Path) -> None:
    group = RingGroup(cluster_config(tiny_model_dir, num_ranks=2), CountingWorker)
    try:
        await group.start()
        await group.execute(prefill(2))
        before = [await worker.num_not_searched.remote() for worker in group.workers]
        await group.execute(StepPlan(1, 2, ended=(1,)))
        async with asyncio.timeout(30):
            for worker in group.workers:
                # torch alone brings so many.
                while await worker.num_not_searched.remote() < 50_000:
                    await asyncio.sleep(0.05)
        result = await group.execute(msgspec.structs.replace(prefill(2), step=3))
    finally:
        await group.stop()

    assert before == [0, 0]
    assert len(result.sampled) == 1


async def test_after_stop_no_actor_is_left(tiny_model_dir: Path, two_nodes: Cluster) -> None:
    async with started(cluster_config(tiny_model_dir, num_ranks=2)) as group:
        await group.execute(prefill(2))
        assert len(_living_workers(two_nodes)) == 2

    async with asyncio.timeout(30):
        while _living_workers(two_nodes):
            await asyncio.sleep(0.05)


def _living_workers(cluster: Cluster) -> list[object]:
    # By address: another Ray cluster may run on this machine.
    return list_actors(
        address=cluster.address,
        filters=[("class_name", "=", "Worker"), ("state", "=", "ALIVE")],
    )


async def test_a_model_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        async with started(cluster_config(tmp_path / "nothing", num_ranks=2)):
            pass


async def test_ranks_that_do_not_fit_are_a_config_error(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, two_nodes: Cluster
) -> None:
    monkeypatch.setattr("kvcluster.cluster.ring_group.PLACEMENT_TIMEOUT_S", 0.5)

    with pytest.raises(ConfigError, match="7 ranks"):
        async with started(cluster_config(tiny_model_dir, num_ranks=7)):
            pass
