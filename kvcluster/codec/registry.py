"""The codecs that exist. Adding one is a file and a line here."""

from kvcluster.codec.base import Codec
from kvcluster.codec.exact import ExactCodec

CODECS: dict[str, Codec] = {codec.name: codec for codec in (ExactCodec(),)}
