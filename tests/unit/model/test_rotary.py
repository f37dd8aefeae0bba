"""The rotation of a layer is read from the model, and undone to what the model had before it."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    GlmConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
)

from kvcluster.errors import ModelUnsupported
from kvcluster.model.attention_hook import IMPLEMENTATION, forward
from kvcluster.model.loader import LoadedModel
from kvcluster.model.probe import probe
from kvcluster.model.reference_attention import ReferenceAttention
from kvcluster.model.rotary import Pairing, Rotary, check_rotary, read_rotary
from kvcluster.types import LayerGeometry
from tests.architectures import VOCAB_SIZE, build, tiny_models

ARCHITECTURES = tiny_models()
NUM_TOKENS = 40

# A product and a sum in float32, once by the model and once by us.
ROUNDING = {"atol": 2e-6, "rtol": 2e-6}

_TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class KeyNotes(ReferenceAttention):
    """Attends as usual, and keeps the keys that the hook gave, [1, K, T, D] for each layer."""

    def __init__(self, layers: tuple[LayerGeometry, ...]) -> None:
        super().__init__(layers)
        self.keys: list[Tensor] = []

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        self.keys.append(k_TKD.transpose(0, 1)[None].clone())
        return super().attend(layer, q_THD, k_TKD, v_TKD, sinks_H)


def served(config: PreTrainedConfig) -> tuple[PreTrainedModel, tuple[LayerGeometry, ...]]:
    model = build(config)
    return model, probe(model)


def keys_at(
    model: PreTrainedModel, layers: tuple[LayerGeometry, ...], positions_T: Tensor
) -> list[Tensor]:
    notes = KeyNotes(layers)
    notes.begin(positions_T)
    ids_T = torch.randint(VOCAB_SIZE, positions_T.shape, generator=torch.Generator().manual_seed(5))
    forward(model, ids_T, positions_T, torch.empty(0, dtype=torch.int64), notes)
    return notes.keys


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_is_read_and_passes_the_check(name: str) -> None:
    model = ARCHITECTURES[name]()
    layers = probe(model)

    rotaries = read_rotary(model, layers)

    check_rotary(model, rotaries)
    assert len(rotaries) == len(layers)
    assert None not in rotaries


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "olmo2", "gpt_oss"])
def test_undoing_gives_what_the_projection_or_norm_of_the_keys_gave(name: str) -> None:
    """Real attention, all layers, positions as in a sequence that starts far in."""
    model = ARCHITECTURES[name]()
    layers = probe(model)
    rotaries = read_rotary(model, layers)
    before_rotation = keys_before_rotation(model)
    positions_T = torch.arange(400, 400 + NUM_TOKENS)

    for index, rotated in enumerate(keys_at(model, layers, positions_T)):
        rotary = rotaries[index]
        assert rotary is not None
        undone = rotary.undo(rotated, positions_T[None])
        own_TKD = before_rotation[index].reshape(NUM_TOKENS, layers[index].num_kv_heads, -1)
        size = float(own_TKD.abs().max())
        torch.testing.assert_close(undone[0].transpose(0, 1) / size, own_TKD / size, **ROUNDING)


def keys_before_rotation(model: PreTrainedModel) -> list[Tensor]:
    """Filled by the next pass: outputs of `k_norm`, else of `k_proj`, layer by layer, tokens
    first."""
    found: list[Tensor] = []

    def note(part: nn.Module, inputs: object, output: Tensor) -> None:
        keys = output[0]
        found.append(keys if len(keys) == NUM_TOKENS else keys.transpose(0, 1))

    names = [name for name, _ in model.named_modules()]
    ending = "k_norm" if any(name.endswith("k_norm") for name in names) else "k_proj"
    for name, part in model.named_modules():
        if name.endswith(ending):
            part.register_forward_hook(note)
    return found


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_applying_after_undoing_gives_the_models_keys_back(name: str) -> None:
    model = ARCHITECTURES[name]()
    layers = probe(model)
    rotaries = read_rotary(model, layers)
    positions_T = torch.arange(NUM_TOKENS)

    for rotary, rotated in zip(rotaries, keys_at(model, layers, positions_T), strict=True):
        assert rotary is not None
        undone = rotary.undo(rotated, positions_T[None])
        again = rotary.apply(undone, positions_T[None])
        assert (again - rotated).norm() < 1e-6 * rotated.norm()
        assert (undone - rotated).norm() > 0.01 * rotated.norm()


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_angles_are_the_models_own_at_far_positions(name: str) -> None:
    """An angle of 131071 radians has a rounding error of 0.004 in float32: ours must be the same
    one, not a better one."""
    model = ARCHITECTURES[name]()
    rotary = read_rotary(model, probe(model))[0]
    assert rotary is not None
    positions_T = torch.tensor([1, 4_097, 65_537, 100_003, 131_070, 131_071])
    x_BKSD = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0))

    cos, sin = model.model.rotary_emb(x_BKSD, positions_T[None])
    cos, sin = cos[:, None, :, :8], sin[:, None, :, :8]
    first, second = x_BKSD.chunk(2, dim=-1)
    own = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    torch.testing.assert_close(rotary.apply(x_BKSD, positions_T[None]), own, **ROUNDING)


def test_layers_of_different_types_have_their_own_frequencies() -> None:
    model = ARCHITECTURES["gemma3"]()

    local, _, full = read_rotary(model, probe(model))

    assert local is not None
    assert full is not None
    assert full.inverse_frequencies_F[-1] < local.inverse_frequencies_F[-1]


def test_a_latent_attention_model_rotates_its_last_dimensions() -> None:
    model = ARCHITECTURES["deepseek_v3"]()

    rotary = read_rotary(model, probe(model))[0]

    assert rotary is not None
    assert (rotary.first_dim, rotary.num_rotated_dims) == (16, 8)


@pytest.mark.parametrize(
    ("config", "num_rotated_dims", "pairing"),
    [
        (CohereConfig(**_TINY), 16, Pairing.INTERLEAVED),
        (GlmConfig(**_TINY, head_dim=16), 8, Pairing.INTERLEAVED),
        (
            GPTNeoXConfig(
                **{name: value for name, value in _TINY.items() if name != "num_key_value_heads"},
                rotary_pct=0.25,
            ),
            4,
            Pairing.HALF_SPLIT,
        ),
    ],
    ids=["cohere", "glm", "gpt_neox"],
)
def test_other_pairings_and_partial_rotation_are_found(
    config: PreTrainedConfig, num_rotated_dims: int, pairing: Pairing
) -> None:
    model = build(config)
    # Whether the whole model can be served is the probe's question.
    model.set_attn_implementation(IMPLEMENTATION)
    geometry = LayerGeometry(num_query_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, scale=1.0)

    rotaries = read_rotary(model, (geometry,) * 4)

    check_rotary(model, rotaries)
    for rotary in rotaries:
        assert rotary is not None
        assert (rotary.num_rotated_dims, rotary.pairing) == (num_rotated_dims, pairing)


def test_layers_without_rotation_have_none() -> None:
    model, layers = served(SmolLM3Config(**_TINY, no_rope_layers=[1, 0, 1, 0]))

    rotaries = read_rotary(model, layers)

    assert [rotary is None for rotary in rotaries] == [False, True, False, True]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            **_TINY, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        Phi3Config(
            **_TINY,
            original_max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_frequencies_that_depend_on_the_prompts_length_are_refused(
    config: PreTrainedConfig,
) -> None:
    model = build(config)
    model.set_attn_implementation(IMPLEMENTATION)
    geometry = LayerGeometry(num_query_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, scale=1.0)

    with pytest.raises(ModelUnsupported, match="depend on the length of the prompt"):
        read_rotary(model, (geometry,) * 4)


def test_a_rotation_that_the_model_does_not_hold_is_refused() -> None:
    """What turns the keys is hidden from us: guessing would give wrong keys."""
    model = ARCHITECTURES["llama"]()
    layers = probe(model)
    own = model.model.rotary_emb

    class Hidden(nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            return own(x, position_ids + position_ids // 3)

    model.model.rotary_emb = Hidden()

    with pytest.raises(ModelUnsupported, match="layer 0 depend on their position"):
        read_rotary(model, layers)


@pytest.mark.parametrize("wrong", ["layers", "pairing", "too few", "none"])
def test_the_check_refuses_a_wrong_rotation(wrong: str) -> None:
    model = ARCHITECTURES["gemma3"]()
    first, second, full = read_rotary(model, probe(model))
    assert first is not None
    given = {
        "layers": (full, second, first),
        "pairing": (dataclasses.replace(first, pairing=Pairing.INTERLEAVED), second, full),
        "too few": (first, second),
        "none": (first, None, full),
    }[wrong]

    with pytest.raises(ModelUnsupported):
        check_rotary(model, given)


def test_blocks_are_turned_the_same_alone_and_together() -> None:
    rotary = Rotary(
        inverse_frequencies_F=10_000.0 ** (-torch.arange(12) / 12),
        scaling=1.3,
        first_dim=3,
        pairing=Pairing.HALF_SPLIT,
    )
    x_BKSD = torch.randn(5, 3, 7, 29, generator=torch.Generator().manual_seed(0))
    positions_BS = torch.arange(35).reshape(5, 7) * 1_003

    together = rotary.undo(x_BKSD, positions_BS)
    alone = [rotary.undo(x[None], at[None]) for x, at in zip(x_BKSD, positions_BS, strict=True)]

    assert torch.equal(together, torch.cat(alone))


def test_queries_are_averaged_over_the_distances_at_which_keys_meet_them() -> None:
    rotary = Rotary(
        inverse_frequencies_F=torch.tensor([1.0, 0.1]),
        scaling=1.0,
        first_dim=0,
        pairing=Pairing.HALF_SPLIT,
    )
    q_BKSD = torch.randn(1, 2, 50, 4, generator=torch.Generator().manual_seed(0))
    distances_S = torch.tensor([0, 3, 40])

    met_KDD = rotary.met_at((q_BKSD.transpose(2, 3) @ q_BKSD)[0], distances_S)

    expected = torch.zeros(2, 4, 4)
    for distance in distances_S:
        seen = rotary.apply(q_BKSD, distance.expand(1, 50))[0]
        expected += seen.transpose(1, 2) @ seen / len(distances_S)
    # Sums of 50 float32 products around 1.
    torch.testing.assert_close(met_KDD.float(), expected, atol=1e-4, rtol=1e-5)


def test_the_real_model_is_read_and_passes_the_check(smollm2: LoadedModel) -> None:
    rotaries = read_rotary(smollm2.module, smollm2.spec.layers)

    check_rotary(smollm2.module, rotaries)
    assert {rotary.num_rotated_dims for rotary in rotaries if rotary is not None} == {64}
