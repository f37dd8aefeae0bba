"""The codecs that exist. Adding one is a file and a line here, or in `plain_methods.PLAIN`."""

from collections.abc import Mapping
from typing import Final

from kvcluster.codec.latent_method import LATENT
from kvcluster.codec.method import CodecMethod
from kvcluster.codec.mixed import mixed
from kvcluster.codec.plain_methods import PLAIN
from kvcluster.policy import Method
from kvcluster.types import EXACT

CODECS: Final[Mapping[str, CodecMethod]] = {
    codec.method.name: mixed(codec)
    for codec in (*PLAIN.values(), LATENT)
    if codec.method.name != EXACT
}
"""Without `exact`, which encodes nothing."""

CODEC_METHODS: Final[tuple[Method, ...]] = (
    PLAIN[EXACT].method,
    *(codec.method for codec in CODECS.values()),
)
"""All of them, as policies name them."""
