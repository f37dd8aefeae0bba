"""Layers are compiled once for one row and once for more, and only where that is asked for."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from kvcluster.model.attention_hook import forward
from kvcluster.model.compiled_layers import CompiledLayers
from kvcluster.model.probe import probe
from tests.architectures import tiny_models
from tests.served_model import served_model

# Norms of a few dozen float32 numbers, rounded in another order.
ATOL = 1e-5


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> None:
    """The compiler makes only so many versions of a function in a process, and wrappers, such as
    transformers has around the layers of all models, are one function to it."""
    torch.compiler.reset()


class RowsThemselves:
    """A `LayerAttention` that gives each row its own values."""

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        return v_TKD.repeat_interleave(q_THD.shape[1] // v_TKD.shape[1], dim=1)


def logits(module: PreTrainedModel, num_rows: int) -> Tensor:
    rows_T = torch.arange(num_rows)
    return forward(module, rows_T + 3, rows_T + 100, rows_T, RowsThemselves())


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_compiled_layers_compute_the_same_and_are_compiled_twice(architecture: str) -> None:
    module = tiny_models()[architecture]()
    probe(module)
    backend = CompileCounterWithBackend("eager")
    layers = CompiledLayers(module, backend)
    counts = []

    for num_rows in (1, 2, 3, 7, 16):
        with layers.in_place():
            found = logits(module, num_rows)
        counts.append(backend.frame_count)
        torch.testing.assert_close(found, logits(module, num_rows), rtol=0, atol=ATOL)

    assert 0 < counts[0] < counts[1]
    assert counts[1:] == [counts[1]] * 4


def test_layers_are_as_they_were_where_compiled_ones_are_not_asked_for() -> None:
    module = tiny_models()["llama"]()
    probe(module)
    backend = CompileCounterWithBackend("eager")
    layers = CompiledLayers(module, backend)

    with pytest.raises(KeyError), layers.in_place():
        raise KeyError

    logits(module, 2)
    assert backend.frame_count == 0


def test_warming_up_compiles_all_that_is_needed_later() -> None:
    model = served_model("llama")
    backend = CompileCounterWithBackend("eager")
    layers = CompiledLayers(model.module, backend)

    layers.warm_up(model.spec, model.device)

    compiled = backend.frame_count
    for num_rows in (1, 2, 5, 64):
        with layers.in_place():
            logits(model.module, num_rows)
    assert backend.frame_count == compiled > 0


def test_a_layer_that_cannot_be_compiled_is_left_as_it_is() -> None:
    model = served_model("llama")

    def refuse(*_arguments: object) -> None:
        raise RuntimeError("not this one")

    layers = CompiledLayers(model.module, refuse)

    layers.warm_up(model.spec, model.device)

    with layers.in_place():
        assert torch.equal(logits(model.module, 2), logits(model.module, 2))
