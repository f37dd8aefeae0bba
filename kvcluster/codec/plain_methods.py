"""Codecs that need no calibration: every layer is written alike."""

from collections.abc import Callable, Mapping
from typing import Final

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.exact_array import DTYPES, ExactArray
from kvcluster.codec.float8 import Float8
from kvcluster.codec.method import CodecMethod, CodecModel, LayerCodec
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from kvcluster.codec.rotated import Rotated
from kvcluster.codec.sections import Sections, powers_of_two
from kvcluster.policy import Arguments, Method, Parameter, PlugPoint
from kvcluster.types import EXACT

_GROUPS: Final = (16, 32, 64, 128, 256)
_SPANS: Final = {3: (0.92, 0.84), 2: (0.85, 0.7)}


def _plain(
    name: str,
    meaning: str,
    codec: Callable[[Arguments], LayerCodec],
    *parameters: Parameter,
) -> CodecMethod:
    def layers(arguments: Arguments, model: CodecModel) -> list[LayerCodec]:
        return [codec(arguments)] * len(model.spec.layers)

    method = Method(
        plug_point=PlugPoint.CODEC, name=name, meaning=meaning, parameters=tuple(parameters)
    )
    return CodecMethod(method, layers)


def _integers(bits: int, *, group: int) -> CodecMethod:
    def codec(arguments: Arguments) -> LayerCodec:
        scale_bits = int(arguments["scale_bits"])
        spans = _SPANS.get(bits, ())
        return LayerCodec(
            ChannelQuantizer(
                bits, group=int(arguments["key_group"]), scale_bits=scale_bits, spans=spans
            ),
            TokenQuantizer(
                bits, group=int(arguments["value_group"]), scale_bits=scale_bits, spans=spans
            ),
        )

    return _plain(
        f"int{bits}",
        f"integers of {bits} bits, keys per channel and values per token",
        codec,
        Parameter(
            name="key_group",
            meaning="tokens of a channel that share a scale",
            default=group,
            choices=_GROUPS,
        ),
        Parameter(
            name="value_group",
            meaning="channels of a token that share a scale",
            default=group,
            choices=_GROUPS,
        ),
        Parameter(
            name="scale_bits",
            meaning="bits of a scale and of a zero-point",
            default=16,
            choices=(16, 8),
        ),
    )


def _rotated(bits: int) -> CodecMethod:
    keys, values = Rotated(bits, centred=True), Rotated(bits, transposed=True)

    def layers(_arguments: Arguments, model: CodecModel) -> list[LayerCodec]:
        return [
            LayerCodec(
                _by_powers_of_two(keys, layer.key_dim),
                values if layer.values_in_keys else _by_powers_of_two(values, layer.value_dim),
            )
            for layer in model.spec.layers
        ]

    method = Method(
        plug_point=PlugPoint.CODEC,
        name=f"rotated{bits}",
        meaning=f"Hadamard rotation and a codebook of {bits} bits",
    )
    return CodecMethod(method, layers)


def _by_powers_of_two(codec: Rotated, dim: int) -> ArrayCodec:
    """The codec for heads of this dimension, which is any multiple of 8."""
    if dim % 8:
        raise ValueError(f"rotated codecs want a head dimension that is a multiple of 8, not {dim}")
    dims = powers_of_two(dim)
    return codec if len(dims) == 1 else Sections((codec,) * len(dims), dims)


FP8: Final = _plain("fp8", "e4m3 floats", lambda _: LayerCodec(Float8(), Float8(transposed=True)))
INT8: Final = _integers(8, group=64)
INT4: Final = _integers(4, group=64)
INT3: Final = _integers(3, group=64)
INT2: Final = _integers(2, group=32)
ROTATED4: Final = _rotated(4)
ROTATED3: Final = _rotated(3)
ROTATED2: Final = _rotated(2)


def _exact(_arguments: Arguments, model: CodecModel) -> list[LayerCodec]:
    array = ExactArray(DTYPES[model.spec.dtype])
    return [LayerCodec(array, array)] * len(model.spec.layers)


PLAIN: Final[Mapping[str, CodecMethod]] = {
    EXACT: CodecMethod(
        Method(plug_point=PlugPoint.CODEC, name=EXACT, meaning="as the model gave them"), _exact
    ),
    **{
        codec.method.name: codec
        for codec in (FP8, INT8, INT4, INT3, INT2, ROTATED4, ROTATED3, ROTATED2)
    },
}
"""All of them by name, and blocks that are not compressed, for parts of other codecs."""
