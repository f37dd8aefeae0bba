"""Latent bases of a model: fitted from second moments, ranked, and kept in a file tied to it.

A basis maps the keys (or the values) of all KV heads of a layer, side by side, to C numbers and
back. Directions are ordered by how much error it costs to lose them, so the first C of them are
the best basis of rank C: a file holds the largest rank, and each request takes a prefix.

The error that counts. Keys: of the logits. A query meets the keys of its own KV head alone, so the
weight of an error is block-diagonal, one block for a head: the second moment of its queries. With
W that weight and S the covariance of the keys, E[(q (k - k'))^2] summed over heads is
tr(W E[(k - k')(k - k')^T]), and is least for a given rank where W^1/2 k is projected on the leading
eigenvectors of W^1/2 S W^1/2 (Eckart and Young 1936). Values: of what the layer adds to the hidden
state, with W_o^T W_o of a head's columns as its block.

File: safetensors. For layer i and array keys or values the tensors `i.keys.mean` [F], `.down`
[F, C], `.up` [C, F] (float32) and `.spectrum` [F] (float64), and `.pool_groups` [K, K] (int64) and
`.pool_scales` [K, K] (float32), which are `HeadPools`. For layers i to j that can share a latent
the first four as `i-j.keys.mean`, with the F of all of them, layer after layer. Bases that were
trained for one codec are named as `refined.refined_tensors` says. And one metadata entry, a JSON
record (`_Header`) with a SHA-256 over itself and all tensors.

Shape letters: F = KV heads * head dimension, C latent dimension, K KV heads, D head dimension,
E hidden dimension.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor

from kvcluster.codec.basis import SMALLEST_SIZE, Basis
from kvcluster.codec.moments import LayerMoments, Spread
from kvcluster.codec.pooled import HeadPools
from kvcluster.codec.refined import Array, RefinedBasis, refined_bases, refined_tensors
from kvcluster.codec.sealed_file import FileKind, digest_of_tensors
from kvcluster.errors import CalibrationMismatch, ConfigError

MIN_TOKENS_PER_DIRECTION: Final = 4
"""A covariance from fewer tokens is mostly noise in its small directions."""

_RIDGE: Final = 1e-4
"""Share of the mean weight that every direction gets: one that no query of the calibration text
has looked at may be looked at later, and its weight must be invertible."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerPools:
    """Which heads of one layer go together."""

    keys: HeadPools
    values: HeadPools


@dataclass(frozen=True, slots=True, eq=False)
class LayerCalibration:
    """Bases of one layer."""

    keys: Basis
    """Of keys before rotation."""
    values: Basis
    pools: LayerPools | None = None
    """None: of a file from before there were any."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupCalibration:
    """Bases of neighbouring layers that share a latent: of their numbers side by side."""

    layers: range
    """As counted in `Calibration.layers`."""
    keys: Basis
    """Of keys before rotation."""
    values: Basis


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """Bases of a model, in call order of its `storing_layers`, and what they were made from."""

    weights_digest: str
    text_digests: tuple[str, ...]
    num_tokens: int
    layers: tuple[LayerCalibration, ...]
    groups: tuple[GroupCalibration, ...] = ()
    """Of layers that can share a latent; a layer may be in several."""
    refined: tuple[RefinedBasis, ...] = ()
    """Trained for one codec each: see `kvcluster.quality.distillation`."""
    recipes_json: str = "[]"
    """What was measured with these bases, in the form that the measurement chose: mostly a
    `policy_bounds.MeasuredTable`."""


def fit_keys(moments: LayerMoments, *, rank: int, scale: float = 1.0) -> Basis:
    """Basis of keys before rotation, weighted by the queries that meet them.

    `scale` is the factor on the logits: with it, spectra of layers compare.
    Raises: ConfigError when the text was too short; ValueError for a rank out of range.
    """
    return _fit(moments.num_tokens, moments.keys, moments.query_KDD * scale**2, rank)


def fit_values(moments: LayerMoments, *, rank: int, output_KDD: Tensor | None = None) -> Basis:
    """Basis of values, weighted by `output_weights` of the layer, or unweighted.

    The way back is linear: it can be applied once to a weighted sum of latents instead of to every
    token. Raises: as `fit_keys`.
    """
    if output_KDD is None:
        dim = len(moments.values.mean_F)
        output_KDD = torch.eye(dim)[None]
    return _fit(moments.num_tokens, moments.values, output_KDD.double(), rank)


def output_weights(output_EHD: Tensor, num_kv_heads: int) -> Tensor:
    """How much errors of values matter: the Gram matrix of the columns of W_o that belong to a
    query head, summed over the query heads of a KV head. [K, D, D], float64."""
    hidden_dim, _, dim = output_EHD.shape
    grouped_EKGD = output_EHD.detach().cpu().double().reshape(hidden_dim, num_kv_heads, -1, dim)
    return torch.einsum("ekgd,ekgf->kdf", grouped_EKGD, grouped_EKGD)


def adaptive_ranks(
    spectra: Sequence[Tensor], *, mean_rank: float, multiple: int = 4
) -> tuple[int, ...]:
    """Ranks of layers, multiples of `multiple`, that lose least error in total for this mean.

    Equals one threshold over all layers on the error that `multiple` more directions save; the
    mean is met from below, to less than one multiple in all layers together. Every layer gets at
    least one multiple. Raises: ValueError for a mean that is out of range.
    """
    highest = sum(len(spectrum) // multiple * multiple for spectrum in spectra) / len(spectra)
    if not multiple <= mean_rank <= highest:
        raise ValueError(f"mean rank: want {multiple} to {highest:g}, got {mean_rank:g}")
    num_groups = round(mean_rank * len(spectra)) // multiple
    groups = [s[: len(s) // multiple * multiple].reshape(-1, multiple) for s in spectra]
    gains = [group.sum(1).tolist() for group in groups]
    taken = [1] * len(spectra)
    # Spectra fall, so the best group not yet taken is the next of some layer.
    best = [(-gain[1], layer) for layer, gain in enumerate(gains) if len(gain) > 1]
    heapq.heapify(best)
    for _ in range(num_groups - len(spectra)):
        _, layer = heapq.heappop(best)
        taken[layer] += 1
        if taken[layer] < len(gains[layer]):
            heapq.heappush(best, (-gains[layer][taken[layer]], layer))
    return tuple(count * multiple for count in taken)


def rank_for_energy(spectrum_F: Tensor, share: float) -> int:
    """The lowest rank that keeps this share of the spectrum."""
    kept_F = spectrum_F.cumsum(0) / spectrum_F.sum()
    return min(int((kept_F < share).sum()) + 1, len(spectrum_F))


def _fit(num_tokens: int, spread: Spread, weight_KDD: Tensor, rank: int) -> Basis:
    dim = len(spread.mean_F)
    if not 1 <= rank <= dim:
        raise ValueError(f"rank: want 1 to {dim}, got {rank}")
    if num_tokens < MIN_TOKENS_PER_DIRECTION * dim:
        raise ConfigError(
            f"calibration text: want at least {MIN_TOKENS_PER_DIRECTION * dim} tokens for a layer "
            f"with {dim} numbers in the keys or values of a token, got {num_tokens}"
        )
    root_FF, inverse_root_FF = _roots(weight_KDD)
    spectrum_F, vectors_FF = torch.linalg.eigh(root_FF @ spread.covariance_FF @ root_FF)
    spectrum_F = spectrum_F.flip(0).clamp_min(0)
    vectors_FC = _with_fixed_signs(vectors_FF.flip(1)[:, :rank])
    largest = spectrum_F[0] if spectrum_F[0] > 0 else torch.ones_like(spectrum_F[0])
    size_C = spectrum_F[:rank].clamp_min(largest * SMALLEST_SIZE**2).sqrt()
    return Basis(
        mean_F=spread.mean_F.float(),
        down_FC=(root_FF @ vectors_FC / size_C).float().contiguous(),
        up_CF=(size_C[:, None] * (vectors_FC.T @ inverse_root_FF)).float().contiguous(),
        spectrum_F=spectrum_F,
    )


def _roots(weight_KDD: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of the block-diagonal weight, and its inverse, as [F, F]."""
    values_KD, vectors_KDD = torch.linalg.eigh(weight_KDD)
    mean = values_KD.mean()
    ridge = _RIDGE * mean if mean > 0 else torch.ones_like(mean)
    sizes_KD = (values_KD.clamp_min(0) + ridge).sqrt()

    def assembled(scales_KD: Tensor) -> Tensor:
        blocks_KDD = (vectors_KDD * scales_KD[:, None, :]) @ vectors_KDD.transpose(-1, -2)
        num_heads, dim, _ = blocks_KDD.shape
        whole_KDKD = torch.zeros(num_heads, dim, num_heads, dim, dtype=blocks_KDD.dtype)
        heads = torch.arange(num_heads)
        whole_KDKD[heads, :, heads] = blocks_KDD
        return whole_KDKD.reshape(num_heads * dim, num_heads * dim)

    return assembled(sizes_KD), assembled(1 / sizes_KD)


def _with_fixed_signs(vectors_FC: Tensor) -> Tensor:
    """An eigenvector's sign is arbitrary; equal moments should give equal files."""
    columns = torch.arange(vectors_FC.shape[1])
    return vectors_FC * vectors_FC[vectors_FC.abs().argmax(0), columns].sign()


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int
    weights_digest: str
    text_digests: tuple[str, ...]
    num_tokens: int
    num_layers: int
    recipes_json: str
    digest: str = ""


_FILE: Final = FileKind(
    name="calibration file",
    metadata_key="kvcluster.calibration",
    format_version=1,
    header=_Header,
    error=CalibrationMismatch,
)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file, replacing an older one only once it is whole. Raises: OSError."""
    header = _Header(
        format_version=_FILE.format_version,
        weights_digest=calibration.weights_digest,
        text_digests=calibration.text_digests,
        num_tokens=calibration.num_tokens,
        num_layers=len(calibration.layers),
        recipes_json=calibration.recipes_json,
    )
    _FILE.write(path, header, _tensors(calibration))


def read_calibration(path: Path, weights_digest: str) -> Calibration:
    """Read a file that was made for the model of this digest, every byte checked.

    Raises: CalibrationMismatch when it is missing, truncated, edited, of an unknown version, or
    made for another model.
    """
    header, tensors = _FILE.read(path)
    if header.weights_digest != weights_digest:
        raise CalibrationMismatch(
            f"calibration file {path} was made for another model: its weights have digest "
            f"{header.weights_digest}, those of this model {weights_digest}"
        )
    layers = tuple(_layer(tensors, index) for index in range(header.num_layers))
    groups = _groups(tensors)
    return Calibration(
        weights_digest=header.weights_digest,
        text_digests=header.text_digests,
        num_tokens=header.num_tokens,
        layers=layers,
        groups=groups,
        refined=refined_bases(tensors, fitted_bases(layers, groups)),
        recipes_json=header.recipes_json,
    )


def fitted_bases(
    layers: Sequence[LayerCalibration], groups: Sequence[GroupCalibration]
) -> dict[tuple[range, Array], Basis]:
    """All of them, by the layers and the array that they are of."""
    units = [
        (range(index, index + 1), layer.keys, layer.values) for index, layer in enumerate(layers)
    ]
    units += [(group.layers, group.keys, group.values) for group in groups]
    found: dict[tuple[range, Array], Basis] = {}
    for of_layers, keys, values in units:
        found |= {(of_layers, "keys"): keys, (of_layers, "values"): values}
    return found


def bases_digest(calibration: Calibration) -> str:
    """What the bases are told apart by, in hex: latents of one digest can be read by another only
    if the two are equal."""
    return digest_of_tensors(_tensors(calibration))


def _tensors(calibration: Calibration) -> dict[str, Tensor]:
    return (
        {
            f"{index}.{name}": tensor
            for index, layer in enumerate(calibration.layers)
            for name, tensor in _named(layer).items()
        }
        | {
            f"{group.layers[0]}-{group.layers[-1]}.{name}": tensor
            for group in calibration.groups
            for name, tensor in _named_bases(group.keys, group.values).items()
        }
        | refined_tensors(calibration.refined)
    )


def _named(layer: LayerCalibration) -> dict[str, Tensor]:
    pools = layer.pools
    arrays = () if pools is None else (("keys", pools.keys), ("values", pools.values))
    return {
        f"{array}.{name}": tensor
        for array, heads in arrays
        for name, tensor in (("pool_groups", heads.groups_NK), ("pool_scales", heads.scales_NK))
    } | _named_bases(layer.keys, layer.values)


def _named_bases(keys: Basis, values: Basis) -> dict[str, Tensor]:
    return {
        f"{array}.{name}": tensor
        for array, basis in (("keys", keys), ("values", values))
        for name, tensor in (
            ("mean", basis.mean_F),
            ("down", basis.down_FC),
            ("up", basis.up_CF),
            ("spectrum", basis.spectrum_F),
        )
    }


def _layer(tensors: Mapping[str, Tensor], index: int) -> LayerCalibration:
    def heads(array: str) -> HeadPools:
        return HeadPools(
            *(tensors[f"{index}.{array}.pool_{name}"] for name in ("groups", "scales"))
        )

    pools = None
    if f"{index}.keys.pool_groups" in tensors:
        pools = LayerPools(heads("keys"), heads("values"))
    keys, values = (_basis(tensors, f"{index}.{array}") for array in ("keys", "values"))
    return LayerCalibration(keys, values, pools)


def _groups(tensors: Mapping[str, Tensor]) -> tuple[GroupCalibration, ...]:
    names = {name.partition(".")[0] for name in tensors}
    ends = sorted(tuple(map(int, name.split("-"))) for name in names if "-" in name)
    return tuple(
        GroupCalibration(
            range(first, last + 1),
            *(_basis(tensors, f"{first}-{last}.{array}") for array in ("keys", "values")),
        )
        for first, last in ends
    )


def _basis(tensors: Mapping[str, Tensor], array: str) -> Basis:
    mean_F, down_FC, up_CF, spectrum_F = (
        tensors[f"{array}.{name}"] for name in ("mean", "down", "up", "spectrum")
    )
    return Basis(mean_F=mean_F, down_FC=down_FC, up_CF=up_CF, spectrum_F=spectrum_F)
