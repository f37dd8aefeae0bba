"""Models with multi-head latent attention are served from the latent and the rotary key."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AXK1Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeLiteConfig,
    LongcatFlashConfig,
    MiniCPM3Config,
    PreTrainedConfig,
    PreTrainedModel,
    YoutuConfig,
)
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.model.attention_hook import IMPLEMENTATION, forward
from kvcluster.model.mla import LatentForm, keep_latents, latent_form
from kvcluster.model.probe import probe
from kvcluster.model.reference_attention import ReferenceAttention
from kvcluster.types import LayerGeometry, ModelSpec
from tests.architectures import VOCAB_SIZE, build, tiny_models

ARCHITECTURES = tiny_models()
LATENT_DIM, ROTARY_DIM = 16, 8
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": LATENT_DIM,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": ROTARY_DIM,
    "v_head_dim": 10,
}
_DEEP = {**_COMMON, "num_hidden_layers": 2, "intermediate_size": 96}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "axk1": lambda: AXK1Config(**_DEEP, **_EXPERTS),
    "deepseek_v2": lambda: DeepseekV2Config(**_DEEP, **_EXPERTS, attention_bias=True),
    "deepseek_v3": lambda: DeepseekV3Config(**_DEEP, **_EXPERTS),
    "deepseek_v3, queries not compressed": lambda: DeepseekV3Config(
        **{**_DEEP, "q_lora_rank": None}, **_EXPERTS
    ),
    "deepseek_v3, halves rotated": lambda: DeepseekV3Config(
        **_DEEP, **_EXPERTS, rope_interleave=False
    ),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(**_DEEP, **_EXPERTS),
    "longcat_flash": lambda: LongcatFlashConfig(
        **_COMMON,
        head_dim=ROTARY_DIM,
        num_layers=1,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=32,
        n_routed_experts=4,
        moe_topk=2,
        zero_expert_num=2,
    ),
    "minicpm3": lambda: MiniCPM3Config(**_DEEP),
    "youtu": lambda: YoutuConfig(**_DEEP),
}
IDS_T = torch.randint(3, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(0))


def eager_logits(model: PreTrainedModel) -> Tensor:
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits_TV: Tensor = model(input_ids=IDS_T[None], use_cache=False).logits[0]
    return logits_TV


def served_logits(model: PreTrainedModel, layers: tuple[LayerGeometry, ...]) -> Tensor:
    attention = ReferenceAttention(layers)
    rows_T = torch.arange(len(IDS_T))
    attention.begin(rows_T)
    return forward(model, IDS_T, rows_T, rows_T, attention)


@cache
def probed(name: str) -> tuple[Tensor, PreTrainedModel, tuple[LayerGeometry, ...]]:
    """What the model itself says, the model set to our attention, and its layers."""
    model = build(_CONFIGS[name]())
    expected_TV = eager_logits(model)
    return expected_TV, model, probe(model)


def assert_same_logits(ours_TV: Tensor, expected_TV: Tensor) -> None:
    # Float32 products and sums in another order.
    scale = expected_TV.abs().max().item()
    torch.testing.assert_close(ours_TV, expected_TV, rtol=0, atol=scale * 2e-5)


def spec_of(layers: tuple[LayerGeometry, ...], bytes_per_element: int) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        layers=layers,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=512,
        eos_token_ids=(),
        dtype="float32",
        bytes_per_element=bytes_per_element,
        weights_digest="",
        tokenizer_digest="",
    )


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [part for part in model.modules() if hasattr(part, "kv_b_proj")]


@pytest.mark.parametrize("name", _CONFIGS)
def test_logits_from_latents_are_those_of_transformers(name: str) -> None:
    expected_TV, model, layers = probed(name)

    assert all(layer.values_in_keys for layer in layers)
    assert_same_logits(served_logits(model, layers), expected_TV)


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_layer_keeps_one_latent_and_one_rotary_key(name: str) -> None:
    _, _, layers = probed(name)

    assert {(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers} == {
        (1, LATENT_DIM + ROTARY_DIM, LATENT_DIM)
    }
    for bytes_per_element in (2, 4):
        expected = (LATENT_DIM + ROTARY_DIM) * len(layers) * bytes_per_element
        assert spec_of(layers, bytes_per_element).kv_bytes_per_token == expected


def test_the_softmax_keeps_the_scale_of_expanded_heads() -> None:
    model = ARCHITECTURES["deepseek_v2"]()

    layers = probe(model)

    scaling = attention_modules(model)[0].scaling
    assert {layer.scale for layer in layers} == {scaling}
    assert scaling != (16 + 8) ** -0.5, "yarn has its part in it"


def test_queries_and_outputs_meet_latents_as_they_met_expanded_heads() -> None:
    module = attention_modules(ARCHITECTURES["deepseek_v3"]())[0]
    model = ARCHITECTURES["deepseek_v3"]()
    keep_latents(model, IMPLEMENTATION)
    form = latent_form(attention_modules(model)[0])
    assert form is not None
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 1, 9, 16, generator=generator)
    rotary = torch.randn(1, 1, 9, 8, generator=generator)
    query = torch.randn(1, 4, 5, 24, generator=generator)
    weights = torch.rand(1, 4, 5, 9, generator=generator)

    with torch.inference_mode():
        key, value = module.expand_kv(latent, rotary)
        scores = form.absorbed(query) @ torch.cat((latent, rotary), dim=-1).transpose(2, 3)
        out_1TH = form.expanded((weights @ latent)[0].transpose(0, 1))

    # Sums of some dozen float32 products of numbers near 1.
    torch.testing.assert_close(scores, query @ key.transpose(2, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(out_1TH, (weights @ value)[0].transpose(0, 1), rtol=0, atol=1e-4)


def test_other_attention_implementations_go_on_as_before() -> None:
    model = build(_CONFIGS["deepseek_v3"]())
    before_TV = eager_logits(model)

    probe(model)

    assert torch.equal(eager_logits(model), before_TV)


def test_another_model_of_the_same_class_is_left_alone() -> None:
    probe(build(_CONFIGS["deepseek_v3"]()))

    other = build(_CONFIGS["deepseek_v3"]())

    assert not any(latent_form(part) for part in other.modules())


def test_latents_kept_twice_are_kept_once() -> None:
    model = build(_CONFIGS["deepseek_v3"]())
    keep_latents(model, IMPLEMENTATION)
    forms = [latent_form(part) for part in attention_modules(model)]

    keep_latents(model, IMPLEMENTATION)

    assert all(isinstance(form, LatentForm) for form in forms)
    assert [latent_form(part) for part in attention_modules(model)] == forms


def _halves_swapped(module: nn.Module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """An expansion that reads the same weight otherwise: values first."""
    heads = module.kv_b_proj(kv_nope).unflatten(-1, (4, -1))[:, 0].transpose(1, 2)
    value, key = heads.split([module.v_head_dim, module.qk_nope_head_dim], dim=-1)
    return torch.cat((key, k_rot.expand(-1, 4, -1, -1)), dim=-1), value


def _other_parameters(module: nn.Module, kv: Tensor, rotary_key: Tensor) -> tuple[Tensor, Tensor]:
    return _halves_swapped(module, kv, rotary_key)


@pytest.mark.parametrize("expand", [_halves_swapped, _other_parameters])
def test_an_unknown_expansion_is_served_expanded(
    expand: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_deepseek_v3.DeepseekV3Attention, "expand_kv", expand)
    model = build(_CONFIGS["deepseek_v3"]())
    expected_TV = eager_logits(model)

    layers = probe(model)

    assert {(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers} == {
        (4, 12 + ROTARY_DIM, 10)
    }
    assert not any(layer.values_in_keys for layer in layers)
    assert_same_logits(served_logits(model, layers), expected_TV)


def test_a_projection_with_a_bias_is_served_expanded() -> None:
    model = build(_CONFIGS["deepseek_v3"]())
    for module in attention_modules(model):
        bias = torch.randn(module.kv_b_proj.out_features, generator=torch.Generator())
        module.kv_b_proj.bias = nn.Parameter(bias)
    expected_TV = eager_logits(model)

    layers = probe(model)

    assert {layer.num_kv_heads for layer in layers} == {4}
    assert_same_logits(served_logits(model, layers), expected_TV)


def codecs_of_latents() -> ModelCodecs:
    _, _, layers = probed("deepseek_v3")
    spec = spec_of(layers, 4)
    return ModelCodecs(CodecModel(spec=spec, device=torch.device("cpu")))


@pytest.mark.parametrize("codec", ["int4:values=rotated3", "int8:values=exact", "fp8:values=int2"])
def test_values_of_latents_cannot_be_written_by_a_codec_of_their_own(codec: str) -> None:
    with pytest.raises(ValueError, match="its values are part of its keys"):
        codecs_of_latents().layers(codec)


@pytest.mark.parametrize("codec", ["latent", "latent:keys=int4,values=int4"])
def test_latents_of_latents_are_refused(codec: str) -> None:
    with pytest.raises(ValueError, match="the model's own latent already"):
        codecs_of_latents().layers(codec)
