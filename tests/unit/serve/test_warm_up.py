"""Warm-up prompts are long enough to reach every rank, and fit what the model allows."""

import pytest

from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.serve.warm_up import warm_up_prompts
from kvcluster.types import LayerGeometry, ModelSpec


def spec(max_context_tokens: int) -> ModelSpec:
    layer = LayerGeometry(num_query_heads=1, num_kv_heads=1, key_dim=8, value_dim=8, scale=1.0)
    return ModelSpec(
        name="m",
        layers=(layer,),
        vocab_size=10,
        max_context_tokens=max_context_tokens,
        eos_token_ids=(),
        dtype="float32",
        bytes_per_element=4,
        weights_digest="",
        tokenizer_digest="",
    )


@pytest.mark.parametrize("num_ranks", [1, 3, 40])
def test_with_the_defaults_it_is_sharded_over_every_rank(num_ranks: int) -> None:
    config = ClusterConfig(ring=RingConfig(num_ranks=num_ranks))

    [prompt] = warm_up_prompts(config, spec(100_000), with_gpus=False)

    assert prompt.num_tokens >= config.engine.shard_min_tokens
    assert prompt.num_tokens >= num_ranks * config.cache.block_size


def test_gpus_are_asked_for_full_chunks_behind_a_history() -> None:
    config = ClusterConfig(
        cache=CacheConfig(capacity_tokens=50_000), engine=EngineConfig(prefill_chunk_tokens=8192)
    )

    [without_gpus] = warm_up_prompts(config, spec(100_000), with_gpus=False)
    longest, *_ = warm_up_prompts(config, spec(100_000), with_gpus=True)

    assert longest.num_tokens > 2 * config.engine.prefill_chunk_tokens
    assert longest.num_tokens > without_gpus.num_tokens


def test_gpus_are_asked_for_shorter_chunks_and_for_a_block_of_single_tokens() -> None:
    config = ClusterConfig(
        cache=CacheConfig(capacity_tokens=50_000), engine=EngineConfig(prefill_chunk_tokens=8192)
    )

    longest, *others = warm_up_prompts(config, spec(100_000), with_gpus=True)

    chunk = config.engine.prefill_chunk_tokens
    assert longest.max_output_tokens > config.cache.block_size
    assert any(prompt.num_tokens < chunk for prompt in others)
    assert any(chunk < prompt.num_tokens < 2 * chunk for prompt in others)


def test_it_leaves_room_for_its_output_within_every_limit() -> None:
    config = ClusterConfig(
        cache=CacheConfig(block_size=16, capacity_tokens=64),
        engine=EngineConfig(shard_min_tokens=10_000),
    )

    for limit, room in ((100_000, 64), (20, 20), (3, 3)):
        for prompt in warm_up_prompts(config, spec(limit), with_gpus=True):
            assert prompt.num_tokens + prompt.max_output_tokens <= room
    assert all(
        prompt.num_tokens == 1 for prompt in warm_up_prompts(config, spec(1), with_gpus=True)
    )
