"""A generation on a context gives the tokens that the whole prompt gives without one."""

from array import array

import pytest
import torch

from kvcluster.cache.store import KVStore
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.api import Finished, GenerationRequest, Output, TokenChunk, Usage
from kvcluster.engine.context_api import ContextRecord, ContextRequest
from kvcluster.engine.service import EngineService
from kvcluster.tenancy.limits import NO_LIMITS
from kvcluster.types import DEFAULT_TENANT
from tests.architectures import VOCAB_SIZE
from tests.served_model import served_model
from tests.thread_executor import hear, running_engine

BLOCK_SIZE = 16


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist()


BOOK, MORE, QUESTION = tokens(150, 1), tokens(37, 2), tokens(9, 3)


def config(num_ranks: int) -> ClusterConfig:
    return ClusterConfig(
        model="tiny",
        cache=CacheConfig(
            block_size=BLOCK_SIZE,
            capacity_tokens=1024,
            exact_recent_tokens=20,
            # Whatever is shared is shared through a context.
            prefix_cache=False,
        ),
        engine=EngineConfig(
            prefill_chunk_tokens=64, shard_min_tokens=32, admit_unmeasured_pooling=True
        ),
        ring=RingConfig(num_ranks=num_ranks),
    )


async def uploaded(service: EngineService, ids: list[int], policy: str = "") -> ContextRecord:
    opened = await service.open_context(ContextRequest(context_id="book", policy=policy))
    chunk = TokenChunk(opened.record.token_count, array("I", ids).tobytes())
    await service.append_context(DEFAULT_TENANT, "book", opened.upload, chunk)
    return await service.finish_context(DEFAULT_TENANT, "book", opened.upload)


async def generate(
    service: EngineService, prompt: list[int], *, policy: str = "", context: str = ""
) -> tuple[list[int], Usage]:
    request = GenerationRequest(model="tiny", max_output_tokens=12, policy=policy, context=context)
    heard = await hear(service, await service.open(request), prompt)
    output = [id_ for event in heard if isinstance(event, Output) for id_ in event.token_ids]
    finished = heard[-1]
    assert isinstance(finished, Finished)
    return output, finished.usage


@pytest.mark.parametrize(
    ("architecture", "policy", "num_ranks"),
    [
        *(("llama", policy, ranks) for policy in ("exact", "int4") for ranks in (1, 2, 3, 4)),
        ("llama", "pooled + int4 + window:recent=64", 2),
        ("gemma2", "exact", 3),
        ("gemma2", "int4", 3),
    ],
)
async def test_a_context_is_read_forked_and_continued_as_if_it_were_computed(
    architecture: str, policy: str, num_ranks: int
) -> None:
    async with running_engine(served_model(architecture), config(num_ranks)) as (service, _):
        record = await uploaded(service, BOOK, policy)
        found, usage = await generate(service, QUESTION, context="book")
        await service.fork_context(DEFAULT_TENANT, "book", "fork", 0, NO_LIMITS)
        await uploaded(service, MORE)
        longer, _ = await generate(service, QUESTION, context="book")
        forked, _ = await generate(service, QUESTION, context="fork")
        expected, _ = await generate(service, [*BOOK, *QUESTION], policy=policy)
        expected_longer, _ = await generate(service, [*BOOK, *MORE, *QUESTION], policy=policy)

    assert found == forked == expected
    assert longer == expected_longer
    assert (usage.cached_input_tokens, usage.input_tokens) == (144, 159)
    assert record.ranks == num_ranks
    if policy == "exact":
        assert (record.attention_error, record.compression_ratio >= 1) == (0, True)
    else:
        assert record.attention_error > 0
        assert record.compression_ratio > 1.5


def written(store: KVStore) -> int:
    """Bytes of a rank's memory that are not zero."""
    return sum(int(torch.count_nonzero(arena._bytes)) for arena in store._arenas)


@pytest.mark.parametrize("policy", ["exact", "int4"])
async def test_a_deleted_context_leaves_no_byte_in_any_block(policy: str) -> None:
    """Those included in which its blocks were exact before they were encoded."""
    async with running_engine(served_model("llama"), config(2)) as (service, executor):
        await uploaded(service, BOOK, policy)
        held = sum(written(runner._store) for runner in executor.runners)
        await service.delete_context(DEFAULT_TENANT, "book", "")
        after = sum(written(runner._store) for runner in executor.runners)

    assert held > 0
    assert after == 0
