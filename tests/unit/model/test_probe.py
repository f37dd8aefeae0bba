"""A model is served exactly or refused with a sentence that says why."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DiffLlamaConfig,
    DogeConfig,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MptConfig,
    MptForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from kvcluster.errors import ModelUnsupported
from kvcluster.model.probe import probe
from tests.architectures import WINDOW, build, tiny_models

SMALL = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_geometry_of_grouped_heads_is_what_the_config_says() -> None:
    layers = probe(tiny_models()["qwen3"]())

    assert {(g.num_query_heads, g.num_kv_heads, g.key_dim, g.value_dim) for g in layers} == {
        (4, 2, 24, 24)
    }


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", (None, None, None)),
        ("qwen2", (None, WINDOW, WINDOW)),
        ("mistral", (WINDOW, WINDOW, WINDOW)),
        ("gemma2", (WINDOW, None, WINDOW)),
        ("gemma3", (WINDOW, WINDOW, None)),
        ("gpt_oss", (WINDOW, None, WINDOW)),
    ],
)
def test_windows_are_recorded_in_call_order(name: str, windows: tuple[int | None, ...]) -> None:
    assert tuple(layer.window for layer in probe(tiny_models()[name]())) == windows


def test_scale_and_soft_cap_of_gemma2_are_its_own() -> None:
    layer = probe(tiny_models()["gemma2"]())[0]

    assert layer.softcap == 5.0
    assert layer.scale == pytest.approx(20**-0.5)


def test_sinks_of_gpt_oss_are_recorded() -> None:
    assert all(layer.has_sinks for layer in probe(tiny_models()["gpt_oss"]()))


def test_a_window_longer_than_the_probe_is_recorded() -> None:
    model = build(MistralConfig(**SMALL, sliding_window=100_000))

    assert {layer.window for layer in probe(model)} == {100_000}


class Reversed(LlamaForCausalLM):
    """Not of transformers."""


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=101, hidden_size=64, n_layer=2, n_head=4))


def mpt() -> PreTrainedModel:
    return MptForCausalLM(MptConfig(vocab_size=101, d_model=64, n_layers=2, n_heads=4))


def mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config)


def t5() -> PreTrainedModel:
    config = T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config)


def built(make_config: Callable[[], PreTrainedConfig]) -> Callable[[], PreTrainedModel]:
    return lambda: build(make_config())


@pytest.mark.parametrize(
    ("make_model", "why"),
    [
        (bloom, "does not go through the attention interface"),
        (mpt, "does not go through the attention interface"),
        (mamba, "does not go through the attention interface"),
        (t5, "encoder-decoder"),
        (lambda: Reversed(LlamaConfig(**SMALL)), "does not come with transformers"),
        (lambda: LlamaModel(LlamaConfig(**SMALL)), "logits of chosen rows"),
        (
            built(lambda: Gemma3TextConfig(**SMALL, use_bidirectional_attention=True)),
            "looks at later tokens",
        ),
        (built(lambda: LlamaConfig(**SMALL, is_causal=False)), "looks at later tokens"),
        (built(lambda: Llama4TextConfig(**SMALL, head_dim=16)), "chunked_attention"),
        (
            built(lambda: Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])),
            "layers of type conv",
        ),
        (built(lambda: DiffLlamaConfig(**SMALL)), "4 attention calls"),
        (built(lambda: DogeConfig(**SMALL)), "layer 0 masks otherwise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_one_sentence(make_model: Callable[[], PreTrainedModel], why: str) -> None:
    model = make_model().eval()

    with pytest.raises(ModelUnsupported) as refusal:
        probe(model)

    assert refusal.value.message.startswith(f"{type(model).__name__} cannot be served, because ")
    assert why in refusal.value.message
    assert "\n" not in refusal.value.message


def test_a_refused_model_keeps_its_attention_implementation() -> None:
    model = build(DiffLlamaConfig(**SMALL))
    before = model.config._attn_implementation

    with pytest.raises(ModelUnsupported):
        probe(model)

    assert model.config._attn_implementation == before


def test_a_layer_whose_window_contradicts_its_type_is_refused() -> None:
    model = tiny_models()["gemma3"]()
    model.model.layers[2].self_attn.sliding_window = WINDOW

    with pytest.raises(ModelUnsupported, match="layer 2 is of type full_attention"):
        probe(model)


def test_a_window_that_the_mask_does_not_have_is_refused() -> None:
    model = tiny_models()["gpt_oss"]()
    model.model.layers[0].self_attn.sliding_window = 2 * WINDOW

    with pytest.raises(ModelUnsupported, match="layer 0 masks otherwise"):
        probe(model)


def test_state_that_passes_outside_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a convolution over tokens would: in pieces it misses what came before."""
    model = tiny_models()["llama"]()
    embed = model.model.embed_tokens

    def mixed(ids: Tensor) -> Tensor:
        embedded: Tensor = torch.nn.Embedding.forward(embed, ids)
        return embedded + embedded.cumsum(dim=1)

    monkeypatch.setattr(embed, "forward", mixed)

    with pytest.raises(ModelUnsupported, match="outside its attention"):
        probe(model)


def test_a_scale_that_the_interface_does_not_see_is_refused() -> None:
    """Queries are changed after the geometry was read, so our logits are not the model's."""
    model = build(GptOssConfig(**SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2))
    calls = 0

    def change(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * calls

    model.model.layers[0].self_attn.q_proj.register_forward_hook(change)

    with pytest.raises(ModelUnsupported, match="other logits"):
        probe(model)
