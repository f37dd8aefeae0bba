"""Forward passes over whole texts, without ever holding the logits of all their tokens.

A pass gives the hidden states after the last layer. The model's own head, with whatever soft-cap
or factor it applies, is run on some rows of them at a time.

Shape letters: T tokens, H query heads, K KV heads, D head dimension, E hidden dimension, R rows,
V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from kvcluster.errors import ModelUnsupported
from kvcluster.model.attention_hook import LayerAttention
from kvcluster.model.loader import LoadedModel

_SLICE_LOGITS: Final = 1 << 24
"""Logits that are held at one time: 64 MiB of float32."""
_SLICE_LOGITS_ON_GPU: Final = 1 << 28
"""1 GiB: the layers run on one token for each slice, which takes a GPU as long as many rows."""


def final_states(
    model: LoadedModel,
    token_ids_T: Tensor,
    attention: LayerAttention,
    *,
    run_tokens: int | None = None,
) -> Tensor:
    """Hidden states [T, E] before the head, of one sequence at positions 0 to T - 1: in one forward
    pass, or in one for each `run_tokens` positions.

    Raises: ModelUnsupported for a model whose head cannot be told from its layers.
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output.last_hidden_state[0].clone())

    positions_T = torch.arange(len(token_ids_T), device=model.device)
    runs = torch.split(positions_T, run_tokens or len(token_ids_T))
    with _after_layers(model, keep):
        for run_T in runs:
            last_R = torch.tensor([len(run_T) - 1], device=model.device)
            model.forward(token_ids_T.to(model.device)[run_T], run_T, last_R, attention)
    return found[0] if len(found) == 1 else torch.cat(found)


def logits_of(model: LoadedModel, states_RE: Tensor) -> Tensor:
    """What the model's head makes of hidden states: logits_RV, float32."""

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = states_RE[None]
        return output

    # The layers run on one token for nothing, so that the model itself calls its head.
    one = torch.zeros(1, dtype=torch.int64, device=model.device)
    rows_R = torch.arange(len(states_RE), device=model.device)
    with _after_layers(model, replace):
        return model.forward(one, one, rows_R, _OneToken())


def row_slices(model: LoadedModel, num_rows: int) -> Iterator[slice]:
    """Slices of rows whose logits fit into memory some ten times."""
    num_logits = _SLICE_LOGITS if model.device.type == "cpu" else _SLICE_LOGITS_ON_GPU
    step = max(1, num_logits // model.spec.vocab_size)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


@contextmanager
def _after_layers(model: LoadedModel, hook: Any) -> Iterator[None]:
    layers = model.module.base_model
    if layers is model.module:
        raise ModelUnsupported(f"{type(model.module).__name__} has no layers apart from its head")
    handle = layers.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _OneToken:
    """A `LayerAttention` for a sequence of one token, which reads itself alone."""

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """See `LayerAttention`."""
        # Sinks would change the output, but nobody looks at it.
        del layer, k_TKD, sinks_H
        return v_TKD.repeat_interleave(q_THD.shape[1] // v_TKD.shape[1], dim=1)
