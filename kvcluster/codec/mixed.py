"""Codecs of which values, or layers with a window, are written as by another codec.

Values bear fewer bits than keys do, and layers with a window hold little: `int4:values=rotated3`,
`int4:windowed=int8`. The other codec has its parameters at their defaults.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from kvcluster.codec.method import CodecMethod, CodecModel, LayerCodec, refuse_values_in_keys
from kvcluster.codec.plain_methods import PLAIN
from kvcluster.policy import Arguments, Parameter

SAME: Final = "same"
_MIXED: Final = {
    "values": "how values are written",
    "windowed": "how layers with a window are written",
}


def mixed(codec: CodecMethod) -> CodecMethod:
    """The codec with parameters `values` and `windowed`, where it has none of that name."""
    own = {parameter.name for parameter in codec.method.parameters}
    added = [
        Parameter(name=name, meaning=meaning, default=SAME, choices=(SAME, *PLAIN))
        for name, meaning in _MIXED.items()
        if name not in own
    ]

    def layers(arguments: Arguments, model: CodecModel) -> list[LayerCodec]:
        mixture = base = codec.layers(arguments, model)
        if "values" not in own and arguments["values"] != SAME:
            refuse_values_in_keys(
                model.spec, "its values are part of its keys: write them alike, without `values`"
            )
            values = _chosen(str(arguments["values"]), base, model)
            mixture = [LayerCodec(k.keys, v.values) for k, v in zip(base, values, strict=True)]
        windowed = _chosen(str(arguments["windowed"]), mixture, model)
        return [
            mixture[layer] if geometry.window is None else windowed[layer]
            for layer, geometry in enumerate(model.spec.layers)
        ]

    parameters = (*codec.method.parameters, *added)
    return CodecMethod(msgspec.structs.replace(codec.method, parameters=parameters), layers)


def _chosen(name: str, base: Sequence[LayerCodec], model: CodecModel) -> Sequence[LayerCodec]:
    return base if name == SAME else PLAIN[name].with_defaults(model)
