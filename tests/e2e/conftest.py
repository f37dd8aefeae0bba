"""A tiny model behind the real router, engine and ranks; only Ray is left out."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import torch

from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.service import EngineService
from kvcluster.model.loader import LoadedModel
from kvcluster.model.probe import probe
from kvcluster.types import ModelSpec
from tests.architectures import VOCAB_SIZE, tiny_models
from tests.thread_executor import ThreadExecutor, running_engine
from tests.unit.router.serving import serving

CONFIG = ClusterConfig(
    model="tiny",
    cache=CacheConfig(block_size=8, capacity_tokens=512),
    engine=EngineConfig(prefill_chunk_tokens=48, shard_min_tokens=40, step_timeout_s=30),
    ring=RingConfig(num_ranks=3),
)


@dataclass(frozen=True)
class Cluster:
    """What a test looks at besides the port."""

    address: str
    service: EngineService
    executor: ThreadExecutor

    async def num_used_blocks(self) -> int:
        status = await self.service.status()
        return sum(rank.num_blocks - rank.num_free_blocks for rank in status.ranks)

    async def until_nothing_is_left(self) -> None:
        """Returns once no block is held and every rank has forgotten every sequence."""
        async with asyncio.timeout(30):
            while True:
                status = await self.service.status()
                if (
                    not status.num_running
                    and not status.num_waiting
                    and not await self.num_used_blocks()
                    and not any(runner.num_sequences for runner in self.executor.runners)
                ):
                    return
                await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    """Gemma 2: windowed and full layers, soft-caps."""
    module = tiny_models()["gemma2"]()
    spec = ModelSpec(
        name="tiny",
        layers=probe(module),
        vocab_size=VOCAB_SIZE,
        max_context_tokens=512,
        eos_token_ids=(2,),
        dtype="float32",
        bytes_per_element=4,
        weights_digest="tiny",
        tokenizer_digest="",
    )
    return LoadedModel(spec=spec, module=module, device=torch.device("cpu"))


@pytest.fixture
async def cluster(tiny_model: LoadedModel) -> AsyncIterator[Cluster]:
    async with (
        running_engine(tiny_model, CONFIG) as (service, executor),
        serving(service, upload_idle_timeout_s=20.0) as server,
    ):
        yield Cluster(server.address, service, executor)
