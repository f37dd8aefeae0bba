"""A single row through kernels gives what the model's own layers give, or is not served so."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from kvcluster.attention.implementation import Implementation
from kvcluster.attention.kernel_attention import KernelAttention
from kvcluster.bench.rank_cache import LoneRank
from kvcluster.cache.store import KVStore
from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.model.loader import LoadedModel
from kvcluster.model.probe import probe
from kvcluster.model.row_layers import RowLayers, row_layers
from kvcluster.types import ModelSpec, Policy
from tests.codec_models import CPU
from tests.kernels.test_steps import in_torch
from tests.reference_group import ReferenceGroup

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA_3_ROTATION = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def loaded(config: PreTrainedConfig) -> LoadedModel:
    torch.manual_seed(0)
    module: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in module.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    spec = ModelSpec(
        name="tiny",
        layers=probe(module),
        vocab_size=SHAPE["vocab_size"],
        max_context_tokens=512,
        eos_token_ids=(),
        dtype="float32",
        bytes_per_element=4,
        weights_digest="",
        tokenizer_digest="",
    )
    return LoadedModel(spec=spec, module=module, device=CPU)


SERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA_3_ROTATION),
    "llama with tied weights": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**{**SHAPE, "head_dim": 12}),
}


@pytest.mark.parametrize("name", SERVED)
def test_layers_like_llama_are_served(name: str, interpreted: torch.device) -> None:
    """Finding them compares one row's queries, keys and logits with the model's own."""
    assert row_layers(loaded(SERVED[name]())) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_layers_that_do_more_are_not_served(
    change: dict[str, object], interpreted: torch.device
) -> None:
    assert row_layers(loaded(LlamaConfig(**SHAPE, **change))) is None


def test_a_model_that_gives_something_else_is_not_served(interpreted: torch.device) -> None:
    model = loaded(LlamaConfig(**SHAPE))
    norm = model.module.get_decoder().norm
    own = norm.forward

    norm.forward = lambda x: own(x) * 1.5

    assert row_layers(model) is None


@pytest.mark.parametrize("kind", [Gemma2Config, GraniteConfig])
def test_other_architectures_are_not_served(
    kind: type[PreTrainedConfig], interpreted: torch.device
) -> None:
    assert row_layers(loaded(kind(**{**SHAPE, "head_dim": 12}))) is None


@pytest.mark.parametrize("codec", ["exact", "int4"])
def test_tokens_are_those_of_the_model_and_no_layer_of_it_is_called(
    codec: str, monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    model = loaded(SERVED["llama"]())
    rows: list[int] = []
    forward = RowLayers.forward

    def noted(layers: RowLayers, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(ids))
        return forward(layers, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RowLayers, "forward", noted)

    found = generated(model, codec, in_kernels)

    assert found == generated(model, codec, in_torch)
    # One more compares them when they are found.
    assert rows == [1] * (1 + OUTPUT_TOKENS - 1)


OUTPUT_TOKENS = 3


def in_kernels(store: KVStore) -> Implementation:
    return KernelAttention(store, dtypes=(torch.float32,))


def generated(
    model: LoadedModel, codec: str, implementation: Callable[[KVStore], Implementation]
) -> list[int]:
    group = ReferenceGroup(
        model,
        num_ranks=1,
        block_size=32,
        exact_blocks=1,
        implementation=implementation,
        codecs=ModelCodecs(CodecModel(spec=model.spec, device=model.device)),
    )
    group.start(0, [(7 * place + 3) % 97 for place in range(100)], Policy(codec=codec))
    group.run({0: 64}, owners=(0,))
    group.run({0: 36}, owners=(0,))
    for _ in range(OUTPUT_TOKENS - 1):
        group.run({0: 1}, owners=(0,))
    return group.output(0)


@pytest.mark.parametrize(("codec", "num_prompt"), [("exact", 62), ("int4", 382)])
def test_steps_begin_before_the_tokens_of_the_one_before_are_known(
    codec: str, num_prompt: int, interpreted: torch.device
) -> None:
    """From a row's second to last token of a block on, so that blocks become encoded too."""
    model = loaded(SERVED["llama"]())
    found, right = (
        LoneRank(model, Policy(codec=codec), capacity=1024, implementation=implementation)
        for implementation in (in_kernels, in_torch)
    )
    for lone in (found, right):
        lone.step(0, num_prompt, ids=[(7 * place + 3) % 97 for place in range(num_prompt)])

    _, token_ids = found.decode(4)

    assert token_ids == right.decode(4)[1]
