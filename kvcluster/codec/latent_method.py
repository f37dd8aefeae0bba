"""Codec `latent`: keys, values or both as learned latents; the other array as any other codec."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.basis import Basis
from kvcluster.codec.calibration import (
    Calibration,
    GroupCalibration,
    LayerCalibration,
    adaptive_ranks,
)
from kvcluster.codec.filling import filled_grades
from kvcluster.codec.joined import joined_keys, joined_values, layer_groups
from kvcluster.codec.latent import LatentKeys, LatentStorage, LatentValues
from kvcluster.codec.method import CodecMethod, CodecModel, LayerCodec, refuse_values_in_keys
from kvcluster.codec.plain_methods import PLAIN
from kvcluster.codec.refined import Array, codec_name
from kvcluster.policy import Arguments, Method, Parameter, PlugPoint

_LATENT: Final = "latent"
_RANK_MULTIPLE: Final = 4
_FLOAT16_BITS: Final = 16
MAX_JOINED_LAYERS: Final = 8
"""Bases grow with the square of the layers, and each layer reads the latent of all."""


def _layers(arguments: Arguments, model: CodecModel) -> list[LayerCodec]:
    refuse_values_in_keys(
        model.spec, "what it caches is the model's own latent already: take another codec"
    )
    keys = _arrays("keys", arguments, model)
    values = _arrays("values", arguments, model)
    return [LayerCodec(*arrays) for arrays in zip(keys, values, strict=True)]


def _arrays(array: Array, arguments: Arguments, model: CodecModel) -> Sequence[ArrayCodec]:
    """The codec of one array of each layer."""
    kind = str(arguments[array])
    if kind == _LATENT:
        return _latents(array, arguments, model)
    layers = PLAIN[kind].with_defaults(model)
    return [layer.keys if array == "keys" else layer.values for layer in layers]


def _latents(array: Array, arguments: Arguments, model: CodecModel) -> list[ArrayCodec]:
    calibration = model.calibration
    if calibration is None:
        raise ValueError(
            "latent codecs need a calibration file of the model: make one with "
            "`kvcluster calibrate` and serve with --set calibration=FILE"
        )
    groups = layer_groups(model.spec.layers, int(arguments["layers"]))
    bases = [_basis(array, group, calibration, int(arguments["layers"])) for group in groups]
    refined = {of.unit: of.basis for of in calibration.refined if of.codec == trained_as(arguments)}
    codecs: list[ArrayCodec] = []
    for group, fitted, rank_and_storage in zip(
        groups, bases, _stored(array, bases, arguments), strict=True
    ):
        # Ranks and grades follow from what was fitted, which all bases of the layers begin with.
        basis = refined.get((group, array), fitted)
        codecs += _of_group(array, group, basis.to(model.device), rank_and_storage, model)
    return codecs


def trained_as(arguments: Arguments) -> str:
    """What `RefinedBasis.codec` is of a latent with these arguments. Others than its own, such as
    how layers with a window are written, do not count."""
    return codec_name(LATENT.method.name, LATENT.method.parameters, arguments)


def _basis(array: Array, group: range, calibration: Calibration, num_layers: int) -> Basis:
    found: LayerCalibration | GroupCalibration | None = calibration.layers[group[0]]
    if len(group) > 1:
        found = next((fitted for fitted in calibration.groups if fitted.layers == group), None)
    if found is None:
        raise ValueError(
            f"layers={num_layers} needs bases of {num_layers} layers together, which the "
            f"calibration file does not have: make one with `kvcluster calibrate --layers "
            f"{num_layers}`"
        )
    return found.keys if array == "keys" else found.values


def _of_group(
    array: Array,
    group: range,
    basis: Basis,
    rank_and_storage: tuple[int, LatentStorage],
    model: CodecModel,
) -> Sequence[ArrayCodec]:
    """The codec of each layer of a group, or of one layer alone."""
    rank, storage = rank_and_storage
    heads = model.spec.layers[group[0]].num_kv_heads
    rotations = [None if model.rotations is None else model.rotations[layer] for layer in group]
    alone = len(group) == 1
    if array == "values":
        if alone:
            return [LatentValues(basis, num_heads=heads, rank=rank, storage=storage)]
        return joined_values(basis, len(group), num_heads=heads, rank=rank, storage=storage)
    if alone:
        [rotation] = rotations
        return [LatentKeys(basis, num_heads=heads, rank=rank, rotation=rotation, storage=storage)]
    return joined_keys(basis, num_heads=heads, rank=rank, rotations=rotations, storage=storage)


def _of_array(name: str, array: Array, arguments: Arguments) -> float:
    """A parameter that values may have of their own."""
    own = float(arguments[f"value_{name}"]) if array == "values" else 0.0
    return own or float(arguments[name])


def _stored(
    array: Array, bases: Sequence[Basis], arguments: Arguments
) -> list[tuple[int, LatentStorage]]:
    """Latent dimension of each layer, or group of them, and how its latents are written."""
    share, bits = _of_array("r", array, arguments), int(_of_array("bits", array, arguments))
    storage = LatentStorage(
        bits=None if bits == _FLOAT16_BITS else bits,
        is_rotated=arguments["codes"] == "rotated",
        group=int(arguments["group"]),
        scale_bits=int(arguments["scale_bits"]),
    )
    if arguments["ranks"] != "filled":
        is_adaptive = arguments["ranks"] == "adaptive"
        return [(rank, storage) for rank in _ranks(bases, share, is_adaptive=is_adaptive)]
    num_directions = sum(len(basis.mean_F) for basis in bases)
    scale_share = storage.scale_share(max(1, round(share * num_directions / len(bases))))
    grades = filled_grades(
        [basis.spectrum_F[: basis.rank] for basis in bases],
        bits_per_token=share * num_directions * (bits + scale_share),
        scale_share=scale_share,
    )
    return [
        (sum(grade.num_directions for grade in of_basis), replace(storage, grades=of_basis))
        for of_basis in grades
    ]


def _ranks(bases: Sequence[Basis], share: float, *, is_adaptive: bool) -> Sequence[int]:
    """Latent dimensions that are multiples of 4."""
    if is_adaptive:
        mean_rank = share * sum(len(basis.mean_F) for basis in bases) / len(bases)
        spectra = [basis.spectrum_F[: basis.rank] for basis in bases]
        return adaptive_ranks(
            spectra, mean_rank=max(mean_rank, _RANK_MULTIPLE), multiple=_RANK_MULTIPLE
        )
    ranks = [
        max(1, round(share * len(basis.mean_F) / _RANK_MULTIPLE)) * _RANK_MULTIPLE
        for basis in bases
    ]
    for rank, basis in zip(ranks, bases, strict=True):
        if rank > basis.rank:
            raise ValueError(
                f"a share of {share:g} is rank {rank}, and the calibration file has {basis.rank} "
                "directions"
            )
    return ranks


_CHOICES: Final = (_LATENT, *PLAIN)

LATENT: Final = CodecMethod(
    Method(
        plug_point=PlugPoint.CODEC,
        name=_LATENT,
        meaning="low-rank latents of keys before rotation, of values, or of both (calibrated)",
        parameters=(
            Parameter(
                name="r",
                meaning="latent dimension as a share of the numbers that a token has in a layer",
                default=0.25,
                lowest=0.0,
                highest=1.0,
                is_lowest_open=True,
            ),
            Parameter(
                name="value_r",
                meaning="the same for values, which want more; 0: as r",
                default=0.0,
                lowest=0.0,
                highest=1.0,
            ),
            Parameter(
                name="bits", meaning="bits of a latent", default=16, choices=(16, 8, 4, 3, 2)
            ),
            Parameter(
                name="value_bits",
                meaning="the same for values; 0: as bits",
                default=0,
                choices=(0, 16, 8, 4, 3, 2),
            ),
            Parameter(
                name="codes",
                meaning="uniform steps between a group's least and largest, or rotated: a rotation "
                "and a codebook, for 4, 3 and 2 bits",
                default="uniform",
                choices=("uniform", "rotated"),
            ),
            Parameter(
                name="keys", meaning="how keys are written", default=_LATENT, choices=_CHOICES
            ),
            Parameter(
                name="values", meaning="how values are written", default=_LATENT, choices=_CHOICES
            ),
            Parameter(
                name="ranks",
                meaning="one latent dimension for all layers, or each what its spectrum asks for; "
                "filled: the same bytes, and each direction the bits that its size asks for",
                default="fixed",
                choices=("fixed", "adaptive", "filled"),
            ),
            Parameter(
                name="layers",
                meaning="neighbouring layers that share one latent",
                default=1,
                lowest=1,
                highest=MAX_JOINED_LAYERS,
            ),
            Parameter(
                name="group",
                meaning="tokens of a direction that share a scale",
                default=64,
                choices=(16, 32, 64, 128, 256),
            ),
            Parameter(
                name="scale_bits",
                meaning="bits of a scale and of a zero-point",
                default=16,
                choices=(16, 8),
            ),
        ),
    ),
    _layers,
)
