"""A model's decoder layers, compiled for as long as it is asked for.

Compiled are the parts of a layer between calls of attention: norms, rotations and activations are
dozens of small kernels otherwise. All layers share what is compiled, one version for a single row
and one for any other number.

Shape letters: T tokens, H query heads, K KV heads, D head dimension.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcluster.model.attention_hook import forward
from kvcluster.types import ModelSpec

Backend = Callable[..., Any]

_MANY_ROWS: Final = 2048
"""What the compiler sees of any number but one: it chooses by it how much a program does, and what
is best for two rows reads memory at half the speed for a chunk."""


class _Nowhere:
    """A `LayerAttention` over no keys, which keeps none."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,  # noqa: ARG002
        v_TKD: Tensor,  # noqa: ARG002
        sinks_H: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        return q_THD.new_zeros((*q_THD.shape[:2], self._spec.layers[layer].value_dim))


class CompiledLayers:
    """The layers of one model. Mutates it within `in_place`, and leaves it as it was."""

    def __init__(self, module: PreTrainedModel, backend: str | Backend = "inductor") -> None:
        """`backend`: of torch.compile. Takes no time; the first two calls of each do."""
        self._module = module
        layers = None
        if isinstance(module, PreTrainedModel):
            layers = getattr(module.get_decoder(), "layers", None)  # type: ignore[no-untyped-call]
        self._layers = list(layers) if isinstance(layers, nn.ModuleList) else []
        self._compiled = [torch.compile(layer.forward, backend=backend) for layer in self._layers]

    def warm_up(self, spec: ModelSpec, device: torch.device) -> None:
        """Compile, now and not when the first requests come: that takes a while. Where a layer
        cannot be compiled, it is left as it is."""
        try:
            for num_rows in (1, _MANY_ROWS) if self._layers else ():
                rows_T = torch.arange(num_rows, device=device)
                positions_T = rows_T % spec.max_context_tokens
                with self.in_place():
                    forward(
                        *(self._module, torch.zeros_like(rows_T), positions_T, rows_T[:1]),
                        _Nowhere(spec),
                    )
        except RuntimeError:
            self._layers, self._compiled = [], []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Calls of the model go through what is compiled."""
        for layer, compiled in zip(self._layers, self._compiled, strict=True):
            layer.forward = compiled
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward
