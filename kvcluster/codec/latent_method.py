"""Codec `latent`: keys, values or both as learned latents; the other array as any other codec."""

from collections.abc import Sequence
from typing import Final, Literal

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.calibration import Basis, adaptive_ranks
from kvcluster.codec.latent import LatentKeys, LatentValues
from kvcluster.codec.method import CodecMethod, CodecModel, LayerCodec, refuse_values_in_keys
from kvcluster.codec.plain_methods import PLAIN
from kvcluster.policy import Arguments, Method, Parameter, PlugPoint

_LATENT: Final = "latent"
_RANK_MULTIPLE: Final = 4
_Array = Literal["keys", "values"]


def _layers(arguments: Arguments, model: CodecModel) -> list[LayerCodec]:
    refuse_values_in_keys(
        model.spec, "what it caches is the model's own latent already: take another codec"
    )
    keys = _arrays("keys", arguments, model)
    values = _arrays("values", arguments, model)
    return [LayerCodec(*arrays) for arrays in zip(keys, values, strict=True)]


def _arrays(array: _Array, arguments: Arguments, model: CodecModel) -> Sequence[ArrayCodec]:
    """The codec of one array of each layer."""
    kind = str(arguments[array])
    if kind == _LATENT:
        return _latents(array, arguments, model)
    layers = PLAIN[kind].with_defaults(model)
    return [layer.keys if array == "keys" else layer.values for layer in layers]


def _latents(array: _Array, arguments: Arguments, model: CodecModel) -> list[ArrayCodec]:
    calibration = model.calibration
    if calibration is None:
        raise ValueError(
            "latent codecs need a calibration file of the model: make one with "
            "`kvcluster calibrate` and serve with --set calibration=FILE"
        )
    bases = [
        (layer.keys if array == "keys" else layer.values).to(model.device)
        for layer in calibration.layers
    ]
    bits = int(arguments["bits"])
    stored_bits = None if bits == 16 else bits
    group, scale_bits = int(arguments["group"]), int(arguments["scale_bits"])
    codecs: list[ArrayCodec] = []
    for index, (geometry, basis, rank) in enumerate(
        zip(model.spec.layers, bases, _ranks(bases, arguments), strict=True)
    ):
        if array == "values":
            codecs.append(
                LatentValues(
                    basis,
                    num_heads=geometry.num_kv_heads,
                    rank=rank,
                    bits=stored_bits,
                    group=group,
                    scale_bits=scale_bits,
                )
            )
        else:
            codecs.append(
                LatentKeys(
                    basis,
                    num_heads=geometry.num_kv_heads,
                    rank=rank,
                    rotation=None if model.rotations is None else model.rotations[index],
                    bits=stored_bits,
                    group=group,
                    scale_bits=scale_bits,
                )
            )
    return codecs


def _ranks(bases: Sequence[Basis], arguments: Arguments) -> Sequence[int]:
    """Latent dimension of each layer: multiples of 4."""
    share = float(arguments["r"])
    if arguments["ranks"] == "adaptive":
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
                f"r={share:g} is rank {rank}, and the calibration file has {basis.rank} directions"
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
            Parameter(name="bits", meaning="bits of a latent", default=16, choices=(16, 8, 4, 3)),
            Parameter(
                name="keys", meaning="how keys are written", default=_LATENT, choices=_CHOICES
            ),
            Parameter(
                name="values", meaning="how values are written", default=_LATENT, choices=_CHOICES
            ),
            Parameter(
                name="ranks",
                meaning="one latent dimension for all layers, or each what its spectrum asks for",
                default="fixed",
                choices=("fixed", "adaptive"),
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
