"""The codecs of one model, by the text that policies name them with."""

from dataclasses import replace
from functools import lru_cache
from typing import Final

import msgspec

from kvcluster.codec.calibration import bases_digest
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
from kvcluster.policy import parse_choice, parse_policy
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

    def _build(self, storage: str) -> tuple[LayerCodec, ...]:
        policy = parse_policy(storage, STORAGE_MENU)
        choice = parse_choice(policy.codec, CODEC_METHODS)
        codec = PLAIN[EXACT] if choice.name == EXACT else CODECS[choice.name]
        layers = codec.layers(choice.arguments, self._model)
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
