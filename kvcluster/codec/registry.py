"""The codecs that exist beside `exact`. Adding one is a file and a line here."""

from collections.abc import Mapping
from typing import Final

from kvcluster.codec.latent_method import LATENT
from kvcluster.codec.method import CodecMethod
from kvcluster.codec.plain_methods import (
    FP8,
    INT2,
    INT3,
    INT4,
    INT8,
    ROTATED2,
    ROTATED3,
    ROTATED4,
)
from kvcluster.policy import Method, PlugPoint
from kvcluster.types import EXACT

CODECS: Final[Mapping[str, CodecMethod]] = {
    codec.method.name: codec
    for codec in (FP8, INT8, INT4, INT3, INT2, ROTATED4, ROTATED3, ROTATED2, LATENT)
}

CODEC_METHODS: Final[tuple[Method, ...]] = (
    Method(plug_point=PlugPoint.CODEC, name=EXACT, meaning="as the model gave them"),
    *(codec.method for codec in CODECS.values()),
)
"""All of them, as policies name them."""
