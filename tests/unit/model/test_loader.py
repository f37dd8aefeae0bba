"""Loading gives a checked model, its spec, and an error that says what to do when it cannot."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BloomConfig, LlamaConfig, Phi3Config, PreTrainedConfig

from kvcluster.errors import ConfigError, ModelNotFound, ModelUnsupported
from kvcluster.model.loader import LoadedModel, load_model, max_context_tokens
from kvcluster.model.reference_attention import ReferenceAttention
from tests.architectures import VOCAB_SIZE, tiny_models


@pytest.fixture
def tiny_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-gemma3"
    tiny_models()["gemma3"]().save_pretrained(directory)
    return directory


def load(source: Path, dtype: str = "auto") -> LoadedModel:
    return load_model(str(source), dtype=dtype, device="cpu")


def test_spec_of_a_directory_is_that_of_its_config(tiny_directory: Path) -> None:
    spec = load(tiny_directory).spec

    assert spec.name == "tiny-gemma3"
    assert spec.vocab_size == VOCAB_SIZE
    assert spec.max_context_tokens == 512
    assert spec.eos_token_ids == (2,)
    assert spec.windows == (12, None)
    assert (spec.dtype, spec.bytes_per_element) == ("float32", 4)


def test_a_directory_without_a_tokenizer_has_no_tokenizer_digest(tiny_directory: Path) -> None:
    assert not load(tiny_directory).spec.has_tokenizer


def test_dtype_converts_the_weights(tiny_directory: Path) -> None:
    model = load(tiny_directory, dtype="bfloat16")

    assert model.module.dtype == torch.bfloat16
    assert (model.spec.dtype, model.spec.bytes_per_element) == ("bfloat16", 2)


def test_auto_is_float32_on_a_cpu_whatever_the_checkpoint_has(tmp_path: Path) -> None:
    tiny_models()["llama"]().to(torch.bfloat16).save_pretrained(tmp_path)

    assert load(tmp_path).spec.dtype == "float32"


def test_random_weights_want_a_config_alone_and_are_the_same_on_every_rank(
    tiny_directory: Path,
) -> None:
    for weights in tiny_directory.glob("*.safetensors"):
        weights.unlink()

    before = torch.random.get_rng_state()
    first, second = (
        load_model(str(tiny_directory), dtype="bfloat16", device="cpu", has_random_weights=True)
        for _ in range(2)
    )

    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.spec == second.spec
    assert first.spec.dtype == "bfloat16"
    pairs = zip(first.module.parameters(), second.module.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    with pytest.raises(ModelNotFound, match=r"no \.safetensors weights"):
        load(tiny_directory)


def test_an_unknown_dtype_is_refused(tiny_directory: Path) -> None:
    with pytest.raises(ConfigError, match="float8"):
        load(tiny_directory, dtype="float8")


def test_weights_digest_tells_two_models_of_one_shape_apart(tmp_path: Path) -> None:
    model = tiny_models()["llama"]()
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "other")

    one, other = load(tmp_path / "one").spec, load(tmp_path / "other").spec

    assert one.weights_digest != other.weights_digest


def test_an_unsupported_model_is_refused_at_load(tmp_path: Path) -> None:
    tiny_models()["llama"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "is_causal": False}))

    with pytest.raises(ModelUnsupported, match="later tokens"):
        load(tmp_path)


def test_code_that_comes_with_a_model_is_refused_without_running_it(tmp_path: Path) -> None:
    tiny_models()["llama"]().save_pretrained(tmp_path)
    config = {
        "model_type": "their-own",
        "auto_map": {
            "AutoConfig": "theirs.Config",
            "AutoModelForCausalLM": "theirs.Model",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("raise SystemExit('ran')")

    with pytest.raises(ModelUnsupported, match="cannot load"):
        load(tmp_path)


def test_a_damaged_weights_file_is_refused(tiny_directory: Path) -> None:
    (tiny_directory / "model.safetensors").write_bytes(b"not weights")

    with pytest.raises(ModelUnsupported, match="cannot load"):
        load(tiny_directory)


def test_an_unknown_name_says_what_can_be_given() -> None:
    with pytest.raises(ModelNotFound, match=r"a \.gguf file, or one of gemma3-270m, smollm2-135m"):
        load(Path("no-such-model"))


class EmptyCalls:
    """Notes the shapes that it is called with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, torch.Size, torch.Size, torch.Size]] = []

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        self.shapes.append((layer, q_THD.shape, k_TKD.shape, v_TKD.shape))
        return q_THD


def test_a_rank_without_tokens_still_takes_part_in_every_layer(tiny_directory: Path) -> None:
    attention, nothing = EmptyCalls(), torch.empty(0, dtype=torch.int64)

    logits_RV = load(tiny_directory).forward(nothing, nothing, nothing, attention)

    assert logits_RV.shape == (0, VOCAB_SIZE)
    assert attention.shapes == [(i, (0, 4, 16), (0, 2, 16), (0, 2, 16)) for i in range(3)]


def longrope() -> PreTrainedConfig:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 128,
    }
    return Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_parameters=rope,
        pad_token_id=0,
    )


def dynamic() -> PreTrainedConfig:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    return LlamaConfig(max_position_embeddings=2048, rope_parameters=rope)


@pytest.mark.parametrize(("config", "limit"), [(longrope(), 128), (dynamic(), 2048)])
def test_rotary_factors_that_depend_on_length_cap_the_context(
    config: PreTrainedConfig, limit: int
) -> None:
    assert max_context_tokens(config) == limit


def test_a_config_without_a_limit_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match="max_position_embeddings"):
        max_context_tokens(BloomConfig())


def greedy_tokens(model: LoadedModel, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """Prefill in one pass, then a token at a time, as a rank does."""
    attention = ReferenceAttention(model.spec.layers)
    fresh, start, output = prompt_ids, 0, []
    while len(output) < num_tokens:
        positions = torch.arange(start, start + len(fresh))
        attention.begin(positions)
        logits_RV = model.forward(
            torch.tensor(fresh), positions, torch.tensor([len(fresh) - 1]), attention
        )
        start += len(fresh)
        fresh = [int(logits_RV.argmax())]
        output += fresh
    return output


def test_greedy_tokens_of_smollm2_are_those_of_transformers(smollm2: LoadedModel) -> None:
    directory = smollm2.module.config._name_or_path
    text = "<|im_start|>user\nName three rivers of Europe.<|im_end|>\n<|im_start|>assistant\n"
    prompt_ids = AutoTokenizer.from_pretrained(directory)(text).input_ids

    ours = greedy_tokens(smollm2, prompt_ids, num_tokens=16)

    smollm2.module.set_attn_implementation("sdpa")
    theirs = smollm2.module.generate(
        torch.tensor([prompt_ids]), max_new_tokens=16, do_sample=False
    )[0, len(prompt_ids) :].tolist()
    smollm2.module.set_attn_implementation("kvcluster")
    assert ours == theirs


def test_smollm2_spec(smollm2: LoadedModel) -> None:
    spec = smollm2.spec

    assert (spec.name, spec.max_context_tokens, spec.eos_token_ids) == ("smollm2-135m", 8192, (2,))
    assert {(g.num_query_heads, g.num_kv_heads, g.key_dim) for g in spec.layers} == {(9, 3, 64)}
    assert len(spec.layers) == 30
    assert spec.has_tokenizer
