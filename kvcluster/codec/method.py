"""A codec as policies name it: what it can be told, and what that makes of a model's layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.calibration import Calibration
from kvcluster.codec.latent import Rotation
from kvcluster.policy import Arguments, Method
from kvcluster.types import ModelSpec


class LayerCodec(NamedTuple):
    """How one layer's blocks are written."""

    keys: ArrayCodec
    values: ArrayCodec
    """Not asked for in a layer whose values are part of its keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecModel:
    """What codecs may look at of a model."""

    spec: ModelSpec
    device: torch.device
    """Where blocks are encoded."""
    calibration: Calibration | None = None
    rotations: Sequence[Rotation | None] | None = None
    """How each layer turns its keys. None: not known, which is enough to lay blocks out."""


@dataclass(frozen=True, slots=True)
class SharingMethod:
    """One way in which layers and heads read the same K and V, whatever codec writes them.

    `layers` gives, from a codec for each layer, those that share. It raises ValueError, saying
    why, for a model or codecs that cannot have these arguments.
    """

    method: Method
    layers: Callable[[Sequence[LayerCodec], Arguments, CodecModel], Sequence[LayerCodec]]


@dataclass(frozen=True, slots=True)
class CodecMethod:
    """One family of codecs. `layers` gives a codec for each layer of a model.

    It raises ValueError, saying why, for a model that cannot have these arguments.
    """

    method: Method
    layers: Callable[[Arguments, CodecModel], Sequence[LayerCodec]]

    def with_defaults(self, model: CodecModel) -> Sequence[LayerCodec]:
        """The codec of each layer with every parameter at its default."""
        defaults = {parameter.name: parameter.default for parameter in self.method.parameters}
        return self.layers(defaults, model)


def refuse_values_in_keys(spec: ModelSpec, reason: str) -> None:
    """Raises: ValueError for a model with multi-head latent attention."""
    if any(layer.values_in_keys for layer in spec.layers):
        raise ValueError(f"the model has multi-head latent attention, and {reason}")
