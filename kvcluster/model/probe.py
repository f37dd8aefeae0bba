"""Finds out at load whether our attention can serve a model exactly, and how each layer attends.

A model is run on a short random prompt three times: with its own eager attention, in one piece
with every call to the hook recorded, and in two pieces through the hook alone. All must agree.
What a short prompt cannot show, the model's own mask rule is asked for.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvcluster.errors import ModelUnsupported
from kvcluster.model.attention_hook import IMPLEMENTATION, forward
from kvcluster.model.mla import keep_latents, latent_form
from kvcluster.model.reference_attention import ReferenceAttention
from kvcluster.model.source import first_line
from kvcluster.types import LayerGeometry

_RECORDING: Final = "kvcluster_probe"
_SERVED_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
_PROMPT_TOKENS: Final = 24
_LONGEST_PROMPT_TOKENS: Final = 96
_RELATIVE_ERROR: Final = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest norm of the difference of two runs' logits over the norm of the logits. Rounding in
float32 stays near 1e-6 (1e-5 with logits far from zero); one key too many or too few gives 0.01
to 1. Half precision rounds by 2e-3 (bfloat16: 1e-2), and a mixture of experts may choose another
expert in a tie."""


class _MaskRule(torch.Tensor):
    """Stands for the mask that a layer would get: carries the rule instead of the values.

    What a model derives from it has the class, but no rule any more.
    """

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    """(sequence, head, query index, key index) -> whether the query sees the key."""
    window: int | None = None


@dataclass(slots=True)
class _Recording:
    """What the hook has seen in the pass so far."""

    layers: list[LayerGeometry] = field(default_factory=list)
    rules: list[_MaskRule | None] = field(default_factory=list)
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """K and V of each layer: while they are held, nothing else gets their memory."""
    attention: ReferenceAttention = field(init=False)

    def __post_init__(self) -> None:
        self.attention = ReferenceAttention(self.layers)

    def earlier_layer(self, kv: tuple[Tensor, Tensor], window: int | None) -> int | None:
        """The first layer that was called with these very tensors and keeps as many tokens."""
        for index, (layer, held) in enumerate(zip(self.layers, self.held, strict=True)):
            if layer.window == window and all(map(_is_same_memory, kv, held)):
                return index
        return None


def probe(module: PreTrainedModel) -> tuple[LayerGeometry, ...]:
    """Learn the layers of a model in call order, and check that serving them gives its answers.

    Leaves the model set to `attention_hook.IMPLEMENTATION`, and its latent attention modules in
    the form of `mla.keep_latents`, whose keys and values of a layer are one array.
    Raises: ModelUnsupported, in one sentence that says why; the model's attention implementation
    is then what it was.
    """
    _refuse_by_kind(module)
    before = module.config._attn_implementation
    is_served = False
    try:
        keep_latents(module, IMPLEMENTATION, _RECORDING)
        layers = _compare_runs(module)
        module.set_attn_implementation(IMPLEMENTATION)
        is_served = True
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _unsupported(
            module, f"it fails in the attention interface ({first_line(error)})"
        ) from error
    finally:
        if not is_served:
            module.set_attn_implementation(before)
    return layers


def _refuse_by_kind(module: PreTrainedModel) -> None:
    config = module.config.get_text_config()
    parameters = inspect.signature(module.forward).parameters
    takes_keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    layer_types = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    reasons = {
        "it is an encoder-decoder model": module.config.is_encoder_decoder,
        "its code does not come with transformers": not type(module).__module__.startswith(
            "transformers."
        ),
        "its attention does not go through the attention interface of transformers": not (
            module._supports_attention_backend
        ),
        "it does not take explicit positions": "position_ids" not in parameters,
        "it cannot compute logits of chosen rows only": "logits_to_keep" not in parameters,
        "it does not pass keyword arguments on to its attention": not takes_keywords,
        f"it has layers of type {', '.join(sorted(layer_types))}": bool(layer_types),
        "its attention looks at later tokens": _is_bidirectional(config),
    }
    for reason, applies in reasons.items():
        if applies:
            raise _unsupported(module, reason)


def _is_bidirectional(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "use_bidirectional_attention", False)) or not getattr(
        config, "is_causal", True
    )


@torch.inference_mode()
def _compare_runs(module: PreTrainedModel) -> tuple[LayerGeometry, ...]:
    ids_T = _prompt(module, _PROMPT_TOKENS)
    recording = _record(module, ids_T)
    layers = tuple(recording.layers)
    _check_layers(module, recording)
    windows = [layer.window for layer in layers if layer.window is not None]
    if windows and _PROMPT_TOKENS < min(windows) + 8 <= _LONGEST_PROMPT_TOKENS:
        ids_T = _prompt(module, min(windows) + 8)

    module.set_attn_implementation("eager")
    own_TV = module(input_ids=ids_T[None], use_cache=False).logits[0].float()
    module.set_attn_implementation(IMPLEMENTATION)
    one_piece_TV = _run_in_pieces(module, layers, ids_T, num_pieces=1)
    _check_close(module, one_piece_TV, own_TV, "its own attention and ours give other logits")
    pieces_TV = _run_in_pieces(module, layers, ids_T, num_pieces=2)
    _check_close(
        module,
        pieces_TV,
        own_TV,
        "tokens reach each other outside its attention: a prompt run in pieces gives other logits",
    )
    return layers


def _prompt(module: PreTrainedModel, num_tokens: int) -> Tensor:
    """Random ids, the same on every rank."""
    vocab_size = module.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(vocab_size, (num_tokens,), generator=generator).to(module.device)


def _record(module: PreTrainedModel, ids_T: Tensor) -> _Recording:
    recording = _Recording()
    positions_T = torch.arange(len(ids_T), device=module.device)
    recording.attention.begin(positions_T)
    module.set_attn_implementation(_RECORDING)
    module(
        input_ids=ids_T[None],
        position_ids=positions_T[None],
        use_cache=False,
        logits_to_keep=positions_T,
        kvcluster_pass=recording,
    )
    return recording


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kvcluster_pass: _Recording | None = None,
    **rules: Any,
) -> tuple[Tensor, None]:
    """Stands in for the hook: notes the rules that it hands to every call and to the mask."""
    if kvcluster_pass is None:
        raise TypeError("keyword arguments do not arrive there")
    if rules.get("position_bias") is not None:
        raise TypeError("it adds a position bias")
    if not query.shape[2] == key.shape[2] == value.shape[2]:
        raise ValueError("it has keys that are not of the prompt's tokens")
    rule = attention_mask if isinstance(attention_mask, _MaskRule) else None
    window = rules.get("sliding_window") or (rule.window if rule is not None else None)
    scale = rules.get("scaling")
    softcap = rules.get("softcap")
    sinks_H = rules.get("s_aux")
    own_dim = query.shape[3]
    latent = latent_form(module)
    if latent is not None:
        query = latent.absorbed(query)
    recording = kvcluster_pass
    window = int(window) if window is not None else None
    kv_layer = recording.earlier_layer((key, value), window)
    recording.rules.append(rule)
    recording.held.append((key, value))
    recording.layers.append(
        LayerGeometry(
            num_query_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            scale=float(scale if scale is not None else own_dim**-0.5),
            window=window,
            softcap=float(softcap) if softcap is not None else None,
            has_sinks=sinks_H is not None,
            kv_layer=kv_layer,
            values_in_keys=latent is not None,
        )
    )
    out_THD = recording.attention.attend(
        len(recording.layers) - 1,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        sinks_H,
    )
    if latent is not None:
        out_THD = latent.expanded(out_THD)
    return out_THD.contiguous().unsqueeze(0), None


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _recording_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    device: torch.device,
    local_size: int | None = None,
    **_shape: Any,
) -> Tensor:
    """Stands in for the mask builders of transformers, which call it with keywords."""
    values = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    rule = values.as_subclass(_MaskRule)
    rule.sees = mask_function
    rule.window = local_size
    return rule


def _check_layers(module: PreTrainedModel, recording: _Recording) -> None:
    config = module.config.get_text_config()
    layers = recording.layers
    if len(layers) != config.num_hidden_layers:
        raise _unsupported(
            module,
            f"{len(layers)} attention calls reach the interface, but it has "
            f"{config.num_hidden_layers} layers",
        )
    layer_types = getattr(config, "layer_types", None) or [None] * len(layers)
    for index, (layer, layer_type) in enumerate(zip(layers, layer_types, strict=True)):
        if layer_type is not None and (layer_type == "sliding_attention") != bool(layer.window):
            raise _unsupported(
                module, f"layer {index} is of type {layer_type} but its window is {layer.window}"
            )
        rule = recording.rules[index]
        if rule is not None and not _is_rule_of(rule, layer.window):
            raise _unsupported(
                module,
                f"layer {index} masks otherwise than by causality and a window of {layer.window}",
            )


def _is_rule_of(rule: _MaskRule, window: int | None) -> bool:
    """Ask the model's own mask about distances that the prompt is too short to show."""
    if rule.sees is None:
        return False
    near = {0, 1, 2, 7, 8}
    edges = set() if window is None else {window - 1, window, window + 1, 2 * window + 1}
    far = {4_099, 65_537}
    queries = torch.tensor(sorted(near | edges | far), device=rule.device)
    keys = torch.cat([queries - edge for edge in sorted(near | edges)]).clamp_min(0)
    distance_TS = queries[:, None] - keys[None, :]
    expected_TS = distance_TS >= 0
    if window is not None:
        expected_TS &= distance_TS < window
    zero = torch.zeros((), dtype=torch.int64, device=rule.device)
    seen_TS = rule.sees(zero, zero, queries[:, None], keys[None, :])
    return torch.equal(seen_TS.expand_as(expected_TS), expected_TS)


def _run_in_pieces(
    module: PreTrainedModel, layers: tuple[LayerGeometry, ...], ids_T: Tensor, *, num_pieces: int
) -> Tensor:
    """Logits of every row. The rows of all pieces but the first are run last to first: a sharded
    piece is not in order either."""
    attention = ReferenceAttention(layers)
    logits_TV = torch.empty(len(ids_T), module.config.get_text_config().vocab_size)
    rows_T = torch.arange(len(ids_T), device=module.device)
    for index, piece in enumerate(rows_T.tensor_split(num_pieces)):
        positions = piece if index == 0 else piece.flip(0)
        attention.begin(positions)
        all_rows = torch.arange(len(positions), device=module.device)
        logits = forward(module, ids_T[positions], positions, all_rows, attention)
        logits_TV[positions.cpu()] = logits.cpu()
    return logits_TV


def _check_close(module: PreTrainedModel, ours_TV: Tensor, own_TV: Tensor, reason: str) -> None:
    own_TV = own_TV.cpu()
    error = float((ours_TV - own_TV).norm() / own_TV.norm().clamp_min(1e-12))
    if not error <= _RELATIVE_ERROR[module.dtype]:
        raise _unsupported(module, f"{reason} (relative error {error:.1e})")


def _unsupported(module: PreTrainedModel, reason: str) -> ModelUnsupported:
    return ModelUnsupported(f"{type(module).__name__} cannot be served, because {reason}")


AttentionInterface.register(_RECORDING, _recording_attention)
AttentionMaskInterface.register(_RECORDING, _recording_mask)
