"""Bases that were trained for one codec of one model, beside the fitted ones that serve any rank.

A fitted basis is best first, so each codec takes a prefix of it. Training moves a basis for one
rank and one way of writing, so it counts for that codec alone: `codec_name`. A refined basis has
the directions of the fitted one that it started from, and its spectrum.

Shape letters: F = KV heads * head dimension (of all layers of a group), C latent dimension.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from kvcluster.codec.basis import Basis
from kvcluster.policy import Arguments, Parameter, choice_text

Array = Literal["keys", "values"]
_PREFIX: Final = "refined"
_PARTS: Final = ("mean", "down", "up")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RefinedBasis:
    """The basis of one array of one layer, or of a group of layers, for one codec."""

    codec: str
    """See `codec_name`."""
    layers: range
    """As counted in `Calibration.layers`."""
    array: Array
    basis: Basis

    @property
    def unit(self) -> tuple[range, Array]:
        return self.layers, self.array


def codec_name(method: str, parameters: Iterable[Parameter], arguments: Arguments) -> str:
    """The codec that bases are refined for, in the policy language: equal for policies that write
    latents alike. Of `arguments` those count that are among `parameters`."""
    changed = {
        parameter.name: arguments[parameter.name]
        for parameter in parameters
        if arguments[parameter.name] != parameter.default
    }
    return choice_text(method, changed)


def refined_tensors(refined: Iterable[RefinedBasis]) -> dict[str, Tensor]:
    """Of a file: `refined.CODEC.i-j.keys.mean` [F], `.down` [F, C] and `.up` [C, F], float32."""
    return {
        f"{_PREFIX}.{each.codec}.{each.layers[0]}-{each.layers[-1]}.{each.array}.{name}": tensor
        for each in refined
        for name, tensor in zip(
            _PARTS, (each.basis.mean_F, each.basis.down_FC, each.basis.up_CF), strict=True
        )
    }


def refined_bases(
    tensors: Mapping[str, Tensor], fitted: Mapping[tuple[range, Array], Basis]
) -> tuple[RefinedBasis, ...]:
    """What `refined_tensors` gave, by codec and layers. `fitted`: the bases they started from."""
    found: dict[tuple[str, int, int, Array], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix == _PREFIX:
            # The codec may have points of its own.
            codec, layers, kind, part = rest.rsplit(".", 3)
            first, last = map(int, layers.split("-"))
            array: Array = "keys" if kind == "keys" else "values"
            found.setdefault((codec, first, last, array), {})[part] = tensor
    return tuple(
        RefinedBasis(
            codec=codec,
            layers=range(first, last + 1),
            array=array,
            basis=Basis(
                mean_F=parts["mean"],
                down_FC=parts["down"],
                up_CF=parts["up"],
                spectrum_F=fitted[range(first, last + 1), array].spectrum_F,
            ),
        )
        for (codec, first, last, array), parts in sorted(found.items())
    )
