"""The codecs that exist. Adding one is a file and a line here."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.float8 import Float8
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from kvcluster.codec.rotated import Rotated
from kvcluster.types import EXACT


class LayerCodec(NamedTuple):
    """How one layer's blocks are written."""

    keys: ArrayCodec
    values: ArrayCodec


_SPANS: Final = (0.85, 0.7)

CODECS: Final[Mapping[str, LayerCodec | None]] = {
    EXACT: None,
    "fp8": LayerCodec(Float8(), Float8(transposed=True)),
    "int8": LayerCodec(ChannelQuantizer(8), TokenQuantizer(8)),
    "int4": LayerCodec(ChannelQuantizer(4), TokenQuantizer(4)),
    "int2": LayerCodec(
        ChannelQuantizer(2, group=32, spans=_SPANS), TokenQuantizer(2, group=32, spans=_SPANS)
    ),
    "rotated4": LayerCodec(Rotated(4, centred=True), Rotated(4, transposed=True)),
    "rotated3": LayerCodec(Rotated(3, centred=True), Rotated(3, transposed=True)),
    "rotated2": LayerCodec(Rotated(2, centred=True), Rotated(2, transposed=True)),
}
"""None: tokens stay as the model gave them, in no need of whole blocks."""
