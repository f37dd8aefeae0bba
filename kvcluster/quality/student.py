"""A policy's latents as they are trained: which layers have them, and what they restore.

Shape letters: B blocks, S tokens of a block, T tokens, K KV heads, D head dimension, F numbers of a
token in the layers of a unit, side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, consecutive
from kvcluster.codec.basis import Basis
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.joined import member_of
from kvcluster.codec.latent import LatentKeys, LatentValues
from kvcluster.codec.method import LayerCodec
from kvcluster.codec.refined import Array, RefinedBasis
from kvcluster.codec.straight_through import TrainableLatent
from kvcluster.model.rotary import Rotary
from kvcluster.quality.strict import ExactTokens, KeysValues, restored
from kvcluster.types import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class TrainedUnit:
    """A layer, or some that share a latent, and the latent of one of their arrays."""

    array: Array
    places: range
    """Of the layers, as counted in `ModelSpec.storing_layers`."""
    latent: TrainableLatent

    @property
    def name(self) -> tuple[range, Array]:
        """As bases are found by: see `fitted_bases`."""
        return self.places, self.array


class Student:
    """All latents of one policy on one model."""

    def __init__(
        self,
        spec: ModelSpec,
        rotaries: Sequence[Rotary | None],
        layers: Sequence[LayerCodec],
        exact: ExactTokens,
        fitted: Mapping[tuple[range, Array], Basis],
    ) -> None:
        """`layers`: of `ModelCodecs.layers`, one for each layer of the model, with the bases
        `fitted` (`calibration.fitted_bases`)."""
        self._spec = spec
        self._rotaries = rotaries
        self._layers = layers
        self._exact = exact
        self.units = tuple(_units(spec, layers, fitted))

    def restored(self, written: Mapping[int, KeysValues]) -> dict[int, KeysValues]:
        """The blocks of each layer that some query of a sequence reads encoded, as they are
        restored: what `RestoredAttention` wants. `written`: K and V of all layers that store them.
        Differentiable in the units' parameters."""
        num_tokens = next(iter(written.values())).k_KTD.shape[1]
        rows = self.encoded_rows(num_tokens)
        plain = {
            layer: KeysValues(
                *(
                    self._plain(codec, x_KTD, rows)
                    for codec, x_KTD in zip(self._layers[layer], arrays, strict=True)
                )
            )
            for layer, arrays in written.items()
        }
        stored = self._spec.storing_layers
        for unit in self.units:
            layers = [stored[place] for place in unit.places]
            parts = self._through(unit, [written[layer] for layer in layers], rows)
            for layer, far_KTD in zip(layers, parts, strict=True):
                plain[layer] = (
                    plain[layer]._replace(k_KTD=far_KTD)
                    if unit.array == "keys"
                    else plain[layer]._replace(v_KTD=far_KTD)
                )
        return plain

    def refined(self, codec: str) -> list[RefinedBasis]:
        """The bases as they are now. `codec`: what they are for, as `RefinedBasis.codec`."""
        return [
            RefinedBasis(
                codec=codec,
                layers=unit.places,
                array=unit.array,
                basis=unit.latent.basis().to(torch.device("cpu")),
            )
            for unit in self.units
        ]

    def encoded_rows(self, num_tokens: int) -> slice:
        """Positions of the blocks that some query of so many tokens reads encoded."""
        size = self._exact.block_size
        blocks = self._exact.encoded_blocks(num_tokens)
        return slice(blocks.start * size, max(blocks.start, blocks.stop) * size)

    def _plain(self, codec: ArrayCodec, x_KTD: Tensor, rows: slice) -> Tensor:
        far_KTD = x_KTD[:, rows].float()
        if isinstance(codec, ExactArray | LatentKeys | LatentValues) or not far_KTD.shape[1]:
            return far_KTD
        positions_T = torch.arange(rows.start, rows.stop, device=x_KTD.device)
        blocks = range(far_KTD.shape[1] // self._exact.block_size)
        with torch.no_grad():
            return restored(far_KTD, codec, blocks, self._exact.block_size, positions_T)

    def gradients(
        self, of_restored: Mapping[int, KeysValues], num_tokens: int
    ) -> dict[tuple[range, Array], Tensor]:
        """g_TF of each unit, from the gradients by what `restored` gives: those by keys as they
        are before rotation."""
        rows = self.encoded_rows(num_tokens)
        stored = self._spec.storing_layers
        found = {}
        for unit in self.units:
            arrays = [of_restored[stored[place]][unit.array == "values"] for place in unit.places]
            g_BSF = self._side_by_side(unit, arrays, self._positions(rows, arrays[0].device))
            scaling = [1.0 if r is None else r.scaling**2 for r in self._rotaries_of(unit)]
            # A rotation by positions is orthogonal, but for its factor.
            factors = torch.tensor(scaling, device=g_BSF.device).repeat_interleave(
                g_BSF.shape[-1] // len(scaling)
            )
            found[unit.name] = (g_BSF * factors).flatten(0, 1)
        return found

    def _through(
        self, unit: TrainedUnit, written: Sequence[KeysValues], rows: slice
    ) -> list[Tensor]:
        """The unit's array in each of its layers, [K, T, D]."""
        arrays = [of_layer[unit.array == "values"][:, rows].float() for of_layer in written]
        if rows.start == rows.stop:
            return arrays
        positions_BS = self._positions(rows, arrays[0].device)
        far_BSF = unit.latent.restored(self._side_by_side(unit, arrays, positions_BS), positions_BS)
        num_heads, _, dim = arrays[0].shape
        parts = []
        for own_BSF, rotary in zip(
            far_BSF.chunk(len(arrays), dim=-1), self._rotaries_of(unit), strict=True
        ):
            own_BKSD = own_BSF.reshape(*positions_BS.shape, num_heads, dim).transpose(1, 2)
            if rotary is not None:
                own_BKSD = rotary.apply(own_BKSD, positions_BS)
            parts.append(own_BKSD.transpose(0, 1).flatten(1, 2))
        return parts

    def _side_by_side(
        self, unit: TrainedUnit, arrays: Sequence[Tensor], positions_BS: Tensor
    ) -> Tensor:
        """x_BSF, as before rotation, of the unit's x_KTD in each of its layers."""
        blocks = [_in_blocks(x_KTD, self._exact.block_size) for x_KTD in arrays]
        unrotated = [
            x_BKSD if rotary is None else rotary.undo(x_BKSD, positions_BS)
            for x_BKSD, rotary in zip(blocks, self._rotaries_of(unit), strict=True)
        ]
        return torch.cat(unrotated, dim=1).transpose(1, 2).flatten(2)

    def _rotaries_of(self, unit: TrainedUnit) -> list[Rotary | None]:
        if unit.array == "values":
            return [None] * len(unit.places)
        return [self._rotaries[self._spec.storing_layers[place]] for place in unit.places]

    def _positions(self, rows: slice, device: torch.device) -> Tensor:
        size = self._exact.block_size
        return consecutive(torch.arange(rows.start, rows.stop, size, device=device), size)


def _in_blocks(x_KTD: Tensor, size: int) -> Tensor:
    num_heads, num_tokens, dim = x_KTD.shape
    return x_KTD.reshape(num_heads, num_tokens // size, size, dim).transpose(0, 1)


def _units(
    spec: ModelSpec,
    layers: Sequence[LayerCodec],
    fitted: Mapping[tuple[range, Array], Basis],
) -> list[TrainedUnit]:
    arrays: tuple[Array, ...] = ("keys", "values")
    units = []
    for place, layer in enumerate(spec.storing_layers):
        for array, codec in zip(arrays, layers[layer], strict=True):
            if not isinstance(codec, LatentKeys | LatentValues):
                continue
            member = member_of(codec)
            if member is not None and member.place:
                continue
            places = range(place, place + (1 if member is None else member.num_layers))
            whole = codec if member is None else member.whole
            written = whole.unrotated if isinstance(whole, LatentKeys) else whole
            assert isinstance(written, LatentValues)
            whole_basis = fitted[places, array].to(written.basis.up_CF.device)
            latent = TrainableLatent(written, whole_basis)
            units.append(TrainedUnit(array, places, latent))
    return units
