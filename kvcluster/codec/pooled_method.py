"""Sharing `pooled`: the KV heads of a layer grouped, each group stored as one head by any codec.

A wrapper of the codec, so blocks, bytes, the exact recent region, retention and sharding are as
with the codec alone. Measured on SmolLM2-135M: see `codec/README.md`.
"""

from collections.abc import Sequence
from typing import Final

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.latent import LatentKeys, LatentValues
from kvcluster.codec.method import CodecModel, LayerCodec, SharingMethod
from kvcluster.codec.pooled import HeadGroups, PooledHeads, neighbours
from kvcluster.policy import Arguments, Method, Parameter, PlugPoint

AVERAGE: Final = "average"
LEARNED: Final = "learned"


def _layers(
    codecs: Sequence[LayerCodec], arguments: Arguments, model: CodecModel
) -> list[LayerCodec]:
    """Layers that have no more heads than are asked for stay as they are."""
    num_pooled = int(arguments["heads"])
    most = max(layer.num_kv_heads for layer in model.spec.layers)
    if most <= num_pooled:
        heads = "KV head" if most == 1 else "KV heads"
        raise ValueError(
            f"heads={num_pooled} pools nothing, because no layer has more than {most} {heads}"
        )
    if any(isinstance(array, LatentKeys | LatentValues) for codec in codecs for array in codec):
        raise ValueError(
            "latents choose their directions across all heads already: pool the heads, or take a "
            "smaller r"
        )
    find = _learned if arguments["by"] == LEARNED else _averaged
    return [
        codec
        if layer.num_kv_heads <= num_pooled
        else _pooled(codec, find(index, num_pooled, model))
        for index, (codec, layer) in enumerate(zip(codecs, model.spec.layers, strict=True))
    ]


def _pooled(codec: LayerCodec, groups: tuple[HeadGroups, HeadGroups]) -> LayerCodec:
    arrays: list[ArrayCodec] = [
        PooledHeads(array, heads) for array, heads in zip(codec, groups, strict=True)
    ]
    return LayerCodec(*arrays)


def _averaged(layer: int, num_pooled: int, model: CodecModel) -> tuple[HeadGroups, HeadGroups]:
    num_heads = model.spec.layers[layer].num_kv_heads
    if num_heads % num_pooled:
        raise ValueError(
            f"heads={num_pooled} does not divide {num_heads} KV heads into groups of one size: "
            f"take a divisor of {num_heads}, or by={LEARNED}"
        )
    groups = neighbours(num_heads, num_pooled)
    return groups, groups


def _learned(layer: int, num_pooled: int, model: CodecModel) -> tuple[HeadGroups, HeadGroups]:
    calibration = model.calibration
    pools = None if calibration is None else calibration.layers[layer].pools
    if pools is None:
        missing = "a calibration file" if calibration is None else "a newer calibration file"
        raise ValueError(
            f"by={LEARNED} needs {missing} of the model: make one with `kvcluster calibrate` and "
            "serve with --set calibration=FILE"
        )
    return pools.keys.of(num_pooled), pools.values.of(num_pooled)


POOLED: Final = SharingMethod(
    Method(
        plug_point=PlugPoint.SHARING,
        name="pooled",
        meaning="KV heads of a layer grouped, each group stored as one head",
        parameters=(
            Parameter(
                name="heads", meaning="heads of a layer that are stored", default=1, lowest=1
            ),
            Parameter(
                name="by",
                meaning="neighbours averaged, or groups and scales that calibration found",
                default=AVERAGE,
                choices=(AVERAGE, LEARNED),
            ),
        ),
    ),
    _layers,
)
