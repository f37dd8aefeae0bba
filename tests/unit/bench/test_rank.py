"""The rank that is timed does what an engine would ask of it, over a cache that is filled."""

import pytest
import torch
from transformers import LlamaConfig

from kvcluster.bench import rank
from kvcluster.bench.rank_cache import (
    LoneRank,
    attention_flops,
    llama_1b,
    matmul_flops,
    random_model,
)
from kvcluster.errors import ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.types import Policy


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    )
    return random_model(config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("codec", ["exact", "int4"])
def test_a_filled_cache_is_gone_on_from(codec: str, model: LoadedModel) -> None:
    lone = LoneRank(model, Policy(codec=codec), capacity=2048)
    lone.fill()

    seconds = [
        lone.step(1024 - 256, 256, ids=[7] * 256),
        lone.step(1024, 1, ids=[7]),
        *(lone.step(1025 + step, 1) for step in range(3)),
    ]

    assert all(each > 0 for each in seconds)
    assert lone.num_tokens == 1028


def test_work_is_counted_as_the_shape_has_it() -> None:
    config = llama_1b(4096)

    # 1.24e9 parameters, of which 2.63e8 are the tied embedding.
    assert matmul_flops(config) == pytest.approx(2 * 0.973e9, rel=0.01)
    assert attention_flops(config, 10, 2) == 4.0 * (11 + 12) * 2048 * 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        rank.run()
