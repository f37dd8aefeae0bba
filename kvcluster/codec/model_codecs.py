"""The codecs of one model, by the text that policies name them with."""

from functools import lru_cache
from typing import Final

from kvcluster.codec.method import CodecModel, LayerCodec
from kvcluster.codec.registry import CODEC_METHODS, CODECS
from kvcluster.policy import parse_choice

MAX_KEPT: Final = 64
"""Codecs that are kept built: requests choose their parameters, so there is no end of them."""


class ModelCodecs:
    """Builds codecs, and keeps those that were used last."""

    def __init__(self, model: CodecModel) -> None:
        self._model = model
        self._build_once = lru_cache(MAX_KEPT)(self._build)

    def layers(self, codec: str) -> tuple[LayerCodec, ...]:
        """The codec of each layer. `codec` is a choice in the policy language, not `exact`.

        Raises: InvalidField for text that names no codec; ValueError, saying why, when the model
        cannot have it.
        """
        return self._build_once(codec)

    def _build(self, codec: str) -> tuple[LayerCodec, ...]:
        choice = parse_choice(codec, CODEC_METHODS)
        return tuple(CODECS[choice.name].layers(choice.arguments, self._model))
