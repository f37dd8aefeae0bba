"""The codecs and the ways to share that exist. Adding one is a file and a line here, or for codecs
in `plain_methods.PLAIN`."""

from collections.abc import Mapping
from typing import Final

from kvcluster.codec.latent_method import LATENT
from kvcluster.codec.method import CodecMethod, SharingMethod
from kvcluster.codec.mixed import mixed
from kvcluster.codec.plain_methods import PLAIN
from kvcluster.codec.pooled_method import POOLED
from kvcluster.policy import Menu, Method
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

SHARINGS: Final[Mapping[str, SharingMethod]] = {
    sharing.method.name: sharing for sharing in (POOLED,)
}
"""Without the model's own, which is a matter of its layers (`LayerGeometry.kv_layer`)."""

SHARING_METHODS: Final[tuple[Method, ...]] = tuple(sharing.method for sharing in SHARINGS.values())

STORAGE_MENU: Final = Menu((*SHARING_METHODS, *CODEC_METHODS))
"""What says how blocks are written: see `Policy.storage`."""
