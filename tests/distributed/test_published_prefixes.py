"""A generation that begins with a published prefix gives the tokens of the whole prompt."""

from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from kvcluster.config import CacheConfig, ClusterConfig, SpillConfig
from kvcluster.engine.api import TokenChunk
from kvcluster.engine.context_api import ContextRequest
from kvcluster.engine.service import EngineService
from kvcluster.types import PUBLISHED
from tests.distributed.stored_contexts import files_in
from tests.distributed.test_contexts import BLOCK_SIZE, BOOK, QUESTION, config, generate, written
from tests.served_model import served_model
from tests.thread_executor import running_engine


def shared_config(num_ranks: int, folder: Path) -> ClusterConfig:
    cache = CacheConfig(block_size=BLOCK_SIZE, capacity_tokens=1024, exact_recent_tokens=20)
    spill = SpillConfig(folder=str(folder))
    return replace(config(num_ranks), cache=cache, spill=spill)


async def publish(service: EngineService, ids: list[int], policy: str) -> None:
    request = ContextRequest(tenant=PUBLISHED, context_id="system", policy=policy, pinned=True)
    opened = await service.open_context(request)
    chunk = TokenChunk(0, array("I", ids).tobytes())
    await service.append_context(PUBLISHED, "system", opened.upload, chunk)
    await service.finish_context(PUBLISHED, "system", opened.upload)


@pytest.mark.parametrize(
    ("architecture", "policy", "num_ranks"),
    [("llama", "exact", 1), ("llama", "exact", 3), ("llama", "int4", 2), ("gemma2", "int4", 3)],
)
async def test_a_published_prefix_is_read_as_if_it_were_computed(
    architecture: str, policy: str, num_ranks: int, tmp_path: Path
) -> None:
    prompt = [*BOOK, *QUESTION]
    setting = shared_config(num_ranks, tmp_path)
    async with running_engine(served_model(architecture), setting) as (service, _):
        expected, plain = await generate(service, prompt, policy=policy)
    async with running_engine(served_model(architecture), setting) as (service, executor):
        await publish(service, BOOK, policy)
        found, usage = await generate(service, prompt, policy=policy)
        await service._stores.wait_idle()
        held = sum(written(runner._store) for runner in executor.runners)
        await service.delete_context(PUBLISHED, "system", "")

    assert found == expected
    assert plain.cached_input_tokens == 0
    assert usage.cached_input_tokens == 144
    assert held > 0
    # Routers keep what is published; no tenant's key would seal it.
    assert files_in(tmp_path) == []
