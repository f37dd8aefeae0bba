"""Real models on real text go on, token for token, as `transformers.generate` does."""

import asyncio
from functools import cache

import pytest
import torch

from kvcluster.bench.text import long_text
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.api import GenerationRequest, Output, TokenChunk
from kvcluster.engine.service import EngineService
from kvcluster.errors import ModelNotFound
from kvcluster.model.attention_hook import IMPLEMENTATION
from kvcluster.model.loader import LoadedModel, load_model
from kvcluster.model.tokenizer import load_tokenizer
from kvcluster.types import DEFAULT_TENANT, SamplingParams
from tests.thread_executor import running_engine

pytestmark = pytest.mark.slow

MODELS = ("smollm2-135m", "gemma3-270m")
PROMPT_TOKENS = (1, 37, 700)
"""A lone token, less than a block, and more than Gemma's window of 512."""

OUTPUT_TOKENS = 12


@cache
def loaded(name: str) -> LoadedModel:
    try:
        return load_model(name, dtype="float32", device="cpu")
    except ModelNotFound as missing:
        pytest.skip(missing.message)


@cache
def text_ids(name: str) -> list[int]:
    tokenizer = load_tokenizer(name)
    assert tokenizer is not None
    encoder = tokenizer.prompt_encoder()
    return encoder.push(long_text()) + encoder.finish()


@cache
def generated(name: str, prompt_tokens: int, output_tokens: int) -> list[int]:
    """What transformers itself generates, greedily."""
    module = loaded(name).module
    module.set_attn_implementation("sdpa")
    ids = torch.tensor([text_ids(name)[:prompt_tokens]])
    output = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=output_tokens,
        min_new_tokens=output_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    module.set_attn_implementation(IMPLEMENTATION)
    return output[0, prompt_tokens:].tolist()


def cluster_config(
    name: str, *, num_ranks: int, block_size: int, chunk_tokens: int, route: str
) -> ClusterConfig:
    return ClusterConfig(
        model=name,
        cache=CacheConfig(block_size=block_size, capacity_tokens=32_768),
        engine=EngineConfig(
            prefill_chunk_tokens=chunk_tokens, shard_min_tokens=16, history_route=route
        ),
        ring=RingConfig(num_ranks=num_ranks),
    )


async def output_of(
    service: EngineService, name: str, prompt_tokens: int, output_tokens: int
) -> list[int]:
    opened = await service.open(
        GenerationRequest(
            model=name,
            max_output_tokens=output_tokens,
            # transformers' min_new_tokens keeps end-of-sequence tokens away in the same way.
            sampling=SamplingParams(min_output_tokens=output_tokens),
        )
    )
    ids = torch.tensor(text_ids(name)[:prompt_tokens], dtype=torch.int32)
    chunk = TokenChunk(0, ids.numpy().tobytes())

    async def upload() -> None:
        await service.append_prompt(opened.generation, opened.upload, chunk)
        await service.finish_prompt(opened.generation, opened.upload)

    # Beside the reader: a generation that nobody reads is cancelled, even in a long prefill.
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(upload())
        return [
            token_id
            async for events in service.watch(DEFAULT_TENANT, opened.generation, 0)
            for event in events
            if isinstance(event.event, Output)
            for token_id in event.event.token_ids
        ]


@pytest.mark.parametrize(
    ("num_ranks", "block_size", "chunk_tokens", "route"),
    [
        (1, 64, 1024, "auto"),
        (2, 16, 96, "pass_kv"),
        (3, 32, 256, "gather"),
        (4, 16, 512, "pass_q"),
        (4, 64, 2048, "auto"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
async def test_tokens_are_those_of_transformers(
    name: str, num_ranks: int, block_size: int, chunk_tokens: int, route: str
) -> None:
    expected = [generated(name, length, OUTPUT_TOKENS) for length in PROMPT_TOKENS]
    config = cluster_config(
        name, num_ranks=num_ranks, block_size=block_size, chunk_tokens=chunk_tokens, route=route
    )

    async with running_engine(loaded(name), config) as (service, _):
        outputs = await asyncio.gather(
            *(output_of(service, name, length, OUTPUT_TOKENS) for length in PROMPT_TOKENS)
        )

    assert outputs == expected


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
async def test_a_prompt_as_long_as_the_model_allows(name: str, num_ranks: int) -> None:
    length = loaded(name).spec.max_context_tokens - OUTPUT_TOKENS
    expected = generated(name, length, OUTPUT_TOKENS)
    config = cluster_config(
        name, num_ranks=num_ranks, block_size=64, chunk_tokens=2048, route="auto"
    )

    async with running_engine(loaded(name), config) as (service, _):
        assert await output_of(service, name, length, OUTPUT_TOKENS) == expected
