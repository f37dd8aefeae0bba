"""A model's decoder layers, compiled for as long as it is asked for.

Compiled are the parts of a layer between calls of attention: norms, rotations and activations of a
few rows are dozens of small kernels otherwise. All layers share what is compiled, one version for
a single row and one for any other number.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Backend = Callable[..., Any]


class CompiledLayers:
    """The layers of one model. Mutates it within `in_place`, and leaves it as it was."""

    def __init__(self, module: PreTrainedModel, backend: str | Backend = "inductor") -> None:
        """`backend`: of torch.compile. Takes no time; the first two calls of each do."""
        decoder = module.get_decoder()  # type: ignore[no-untyped-call]
        layers = getattr(decoder, "layers", None)
        self._layers = list(layers) if isinstance(layers, nn.ModuleList) else []
        self._compiled = [torch.compile(layer.forward, backend=backend) for layer in self._layers]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Calls of the model go through what is compiled."""
        for layer, forward in zip(self._layers, self._compiled, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward
