"""Tiny random models of the architectures that must be served exactly, built from their configs.

All have at least two layers, grouped or plain heads as the architecture allows, windows short
enough that a prompt of 40 tokens leaves them, and float32 weights that depend on the seed alone.
"""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 211
"""Prime, so that no dimension of a tiny model equals it by accident."""

WINDOW = 12
"""Tokens that a windowed layer of a tiny model sees."""

_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_SHARING = {
    **_SHARED,
    "num_hidden_layers": 5,
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ],
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
}
"""Layers 3 and 4 read the K and V of layers 2 and 1."""


def tiny_models() -> dict[str, Callable[[], PreTrainedModel]]:
    """One factory per architecture, by the name of the architecture. Calling one builds the model
    in eval mode, with the same weights each time."""
    return {name: _factory(config) for name, config in _CONFIGS.items()}


def build(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A model of this config with random weights that make every part of it count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # The library starts norms and biases at 0 or 1 and the rest so small that a wrong mask or
        # a lost norm would hardly change the logits.
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.2 * torch.randn_like(parameter)
                parameter.copy_(parameter + noise if parameter.ndim < 2 else noise)
    return model.eval()


def _factory(make_config: Callable[[], PreTrainedConfig]) -> Callable[[], PreTrainedModel]:
    return lambda: build(make_config())


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHARED),
    "qwen2": lambda: Qwen2Config(
        **_SHARED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_SHARED, head_dim=24),
    "mistral": lambda: MistralConfig(**_SHARED, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **_SHARED,
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHARED,
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3n": lambda: Gemma3nTextConfig(
        **_SHARING,
        laurel_rank=8,
        altup_num_inputs=3,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0, 0.5],
    ),
    "gemma4": lambda: Gemma4TextConfig(
        **_SHARING, global_head_dim=24, final_logit_softcapping=10.0
    ),
    "phi3": lambda: Phi3Config(**_SHARED, sliding_window=None),
    "olmo": lambda: OlmoConfig(**_SHARED, clip_qkv=4.0),
    "olmo2": lambda: Olmo2Config(**_SHARED),
    "mixtral": lambda: MixtralConfig(
        **_SHARED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    # What V2 and V3 differ in, and a yarn whose scale reaches the softmax.
    "deepseek_v2": lambda: DeepseekV2Config(
        **{**_SHARED, "num_key_value_heads": 4},
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 64,
        },
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_SHARED, "num_key_value_heads": 4},
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_SHARED,
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
        },
    ),
}
