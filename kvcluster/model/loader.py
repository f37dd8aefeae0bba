"""Loads a model onto one rank, checked and set to our attention."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvcluster.codec.exact_array import DTYPES
from kvcluster.errors import ConfigError, ModelUnsupported
from kvcluster.model.attention_hook import LayerAttention, forward
from kvcluster.model.probe import probe
from kvcluster.model.source import LOAD_ERRORS, ModelFiles, find_model, first_line
from kvcluster.types import ModelSpec

_SEED: Final = 0
"""Of random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model ready to run on one device. `module` is in eval mode and shares its weights with
    the other ranks of the machine where it was mapped from a file."""

    spec: ModelSpec
    module: PreTrainedModel
    device: torch.device

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        logit_rows_R: Tensor,
        attention: LayerAttention,
    ) -> Tensor:
        """Run the model on this rank's tokens: see `attention_hook.forward`.

        T may be 0, for a rank that has no tokens in a step in which others need its cache: then
        only the attention of each layer is called, with empty tensors and no sinks.
        """
        if len(token_ids_T):
            return forward(self.module, token_ids_T, positions_T, logit_rows_R, attention)
        return self._forward_nothing(attention)

    @torch.inference_mode()
    def _forward_nothing(self, attention: LayerAttention) -> Tensor:
        for layer, geometry in enumerate(self.spec.layers):
            q_THD = self._empty(0, geometry.num_query_heads, geometry.key_dim)
            k_TKD = self._empty(0, geometry.num_kv_heads, geometry.key_dim)
            v_TKD = self._empty(0, geometry.num_kv_heads, geometry.value_dim)
            attention.attend(layer, q_THD, k_TKD, v_TKD, None)
        return torch.empty(0, self.spec.vocab_size, device=self.device)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.module.dtype, device=self.device)


def load_model(
    source: str,
    *,
    dtype: str,
    device: str,
    cache_dir: Path | None = None,
    has_random_weights: bool = False,
) -> LoadedModel:
    """Load a model by short name, directory or GGUF file, and check that it can be served.

    `dtype` is `auto`, `float32`, `bfloat16` or `float16`; auto: float32 on the CPU, elsewhere the
    checkpoint's (which for a GGUF file is float32). Converted files go to `cache_dir`, by default
    ~/.cache/kvcluster. `has_random_weights`: whatever weights there are, they are not read; equal
    ones on all ranks with devices of one kind. Takes seconds, blocks.
    Raises: ConfigError (dtype), ModelNotFound, ModelUnsupported.
    """
    target = torch.device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: want auto, {', '.join(DTYPES)}, got {dtype!r}")
    wanted: torch.dtype | str = DTYPES.get(dtype, "auto")
    if dtype == "auto" and target.type == "cpu":
        wanted = torch.float32
    files = find_model(source, cache_dir, needs_weights=not has_random_weights)
    if has_random_weights:
        module = _of_random_numbers(files, wanted, target).eval()
    else:
        module = _from_directory(files, wanted).to(target).eval()
    return LoadedModel(spec=_spec(files, module), module=module, device=target)


def _from_directory(files: ModelFiles, dtype: torch.dtype | str) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            files.directory,
            dtype=dtype,
            # Pickled weights could run code, and so could a model's own Python files.
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except LOAD_ERRORS as error:
        raise ModelUnsupported(
            f"transformers cannot load {files.directory}: {first_line(error)}"
        ) from error


def _of_random_numbers(files: ModelFiles, dtype: torch.dtype | str, device: torch.device) -> Any:
    """Made on the device: a model of billions of weights would take the CPU minutes."""
    try:
        config = AutoConfig.from_pretrained(
            files.directory, trust_remote_code=False, local_files_only=True
        )
        wanted = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.device(device),
        ):
            torch.manual_seed(_SEED)
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=wanted, trust_remote_code=False
            )
    except LOAD_ERRORS as error:
        raise ModelUnsupported(
            f"transformers cannot make {files.directory}: {first_line(error)}"
        ) from error


def _spec(files: ModelFiles, module: PreTrainedModel) -> ModelSpec:
    config = module.config.get_text_config()
    return ModelSpec(
        name=files.name,
        layers=probe(module),
        vocab_size=config.vocab_size,
        max_context_tokens=max_context_tokens(config),
        eos_token_ids=_eos_token_ids(module),
        dtype=str(module.dtype).removeprefix("torch."),
        bytes_per_element=module.dtype.itemsize,
        weights_digest=files.weights_digest,
        tokenizer_digest=files.tokenizer_digest,
        dense_flops_per_token=_dense_flops_per_token(module),
    )


def _dense_flops_per_token(module: PreTrainedModel) -> int:
    """Two for each weight that a row is multiplied with: all but the table of embeddings, which is
    looked up. Of a mixture of experts that is an upper bound."""
    tables = {id(module.get_input_embeddings().weight), id(_output_weight(module))}
    return 2 * sum(each.numel() for each in module.parameters() if id(each) not in tables)


def _output_weight(module: PreTrainedModel) -> object:
    """Of the head, which sees one row of a prompt."""
    head: torch.nn.Module | None = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    return None if head is None else head.weight


def context_of(source: str, *, cache_dir: Path | None = None) -> int:
    """`max_context_tokens` of a model that is not loaded.

    Raises: ModelNotFound, ModelUnsupported.
    """
    files = find_model(source, cache_dir)
    try:
        config = AutoConfig.from_pretrained(files.directory, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelUnsupported(
            f"transformers cannot read {files.directory}: {first_line(error)}"
        ) from error
    return max_context_tokens(config.get_text_config())


def max_context_tokens(config: PreTrainedConfig) -> int:
    """The most tokens that a sequence may have.

    That is max_position_embeddings, except where the rotary factors change with the length that
    one forward pass happens to see (`dynamic`, `longrope`): a rank sees only its own rows, so
    such a model is served up to its original length, within which the factors are fixed.
    Raises: ModelUnsupported when the config names no limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        raise ModelUnsupported(
            f"{config.model_type} cannot be served, because its config has no "
            "max_position_embeddings"
        )
    for rules in _rope_rules(config):
        if rules.get("rope_type") in ("dynamic", "longrope"):
            original = rules.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, original or limit)
    return int(limit)


def _rope_rules(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Rotary rules of the model, or of each of its layer types."""
    rules = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rules.values() if isinstance(value, dict)]
    return nested or [rules]


def _eos_token_ids(module: PreTrainedModel) -> tuple[int, ...]:
    found: list[int] = []
    for config in (module.generation_config, module.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        found += [ids] if isinstance(ids, int) else list(ids or ())
    return tuple(dict.fromkeys(found))
