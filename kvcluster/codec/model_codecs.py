"""The codecs of one model, by the text that policies name them with."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

import msgspec

from kvcluster.codec.calibration import bases_digest
from kvcluster.codec.joined import member_of
from kvcluster.codec.latent import LatentKeys, LatentValues
from kvcluster.codec.method import CodecModel, LayerCodec
from kvcluster.codec.plain_methods import PLAIN
from kvcluster.codec.registry import (
    CODEC_METHODS,
    CODECS,
    SHARING_METHODS,
    SHARINGS,
    STORAGE_MENU,
)
from kvcluster.policy import Choice, parse_choice, parse_policy
from kvcluster.types import EXACT, Policy

MAX_KEPT: Final = 64
"""Codecs that are kept built: requests choose their parameters, so there is no end of them."""


class ModelCodecs:
    """Builds codecs, and keeps those that were used last."""

    def __init__(self, model: CodecModel) -> None:
        stored = model.spec.storing_layers
        self._model = _storing(model)
        self._places = [
            stored.index(model.spec.kv_layer_of(layer)) for layer in range(len(model.spec.layers))
        ]
        self._build_once = lru_cache(MAX_KEPT)(self._build)

    def layers(self, storage: str) -> tuple[LayerCodec, ...]:
        """The codec of each layer; a layer that reads the K and V of another has that one's.
        `storage` is a `Policy.storage`, not `exact`: a codec, and perhaps a way to share.

        Raises: InvalidField for text that names none; ValueError, saying why, when the model
        cannot have it.
        """
        return self._build_once(storage)

    def calibration_digest(self, storage: str) -> str:
        """What tells the bases apart that blocks are written with; empty where there are none.
        Raises: as `layers`."""
        calibration = self._model.calibration
        policy = parse_policy(storage, STORAGE_MENU)
        is_fitted = policy.sharing != Policy().sharing or any(
            isinstance(array, LatentKeys | LatentValues)
            for layer in self.layers(storage)
            for array in layer
        )
        return bases_digest(calibration) if is_fitted and calibration is not None else ""

    def encoded_step(self, storage: str, recent_blocks: int) -> int | None:
        """How many blocks become encoded at a time (`ExactRegion.step_blocks`), where rows read
        `recent_blocks` before their own exact: as many, where layers share what is written of a
        block. Raises: as `layers`."""
        if storage == EXACT or not self.joins_layers(storage):
            return None
        return max(1, recent_blocks)

    def joins_layers(self, storage: str) -> bool:
        """Whether some layers are written together. Raises: as `layers`."""
        return any(
            member_of(array) is not None for layer in self.layers(storage) for array in layer
        )

    def _build(self, storage: str) -> tuple[LayerCodec, ...]:
        policy = parse_policy(storage, STORAGE_MENU)
        choice = parse_choice(policy.codec, CODEC_METHODS)
        codec = PLAIN[EXACT] if choice.name == EXACT else CODECS[choice.name]
        layers = codec.layers(choice.arguments, self._model)
        _check_joined(choice, layers)
        if policy.sharing != Policy().sharing:
            sharing = parse_choice(policy.sharing, SHARING_METHODS)
            layers = SHARINGS[sharing.name].layers(layers, sharing.arguments, self._model)
        return tuple(layers[place] for place in self._places)


def _storing(model: CodecModel) -> CodecModel:
    """The model as codecs see it: with the layers alone that have K and V of their own."""
    spec, rotations = model.spec, model.rotations
    stored = spec.storing_layers
    return replace(
        model,
        spec=msgspec.structs.replace(spec, layers=tuple(spec.layers[index] for index in stored)),
        rotations=None if rotations is None else [rotations[index] for index in stored],
    )


def _check_joined(choice: Choice, layers: Sequence[LayerCodec]) -> None:
    num_joined = int(choice.arguments.get("layers", 1))
    if num_joined > 1 and all(member_of(array) is None for layer in layers for array in layer):
        raise ValueError(
            f"layers={num_joined} puts no layers together: it takes latents of neighbouring "
            "layers of one shape and window, of which this model has none so written"
        )
