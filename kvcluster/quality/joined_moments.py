"""What bases of several layers together are fitted from: moments of their keys and values side by
side.

A group counts as a layer that has the heads of all its layers. How much an error matters is known
layer by layer: no query meets the keys of another layer.

Shape letters: T tokens, K KV heads, D head dimension.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from kvcluster.codec.calibration import GroupCalibration, fit_keys, fit_values
from kvcluster.codec.joined import layer_groups
from kvcluster.codec.moments import LayerMoments, MomentSums
from kvcluster.types import LayerGeometry, ModelSpec


class ErrorWeights(NamedTuple):
    """How much errors matter in one layer, head by head."""

    query_KDD: Tensor
    """Of keys before rotation: see `fit_keys`."""
    output_KDD: Tensor | None
    """Of values: see `fit_values`."""


def groups_of(layers: Sequence[LayerGeometry], sizes: Collection[int]) -> tuple[range, ...]:
    """The groups of at least two layers that latents of so many layers (for each of the sizes) are
    shared by, each once."""
    groups = (group for size in sorted(sizes) for group in layer_groups(layers, size))
    return tuple(dict.fromkeys(group for group in groups if len(group) > 1))


def side_by_side(layers: Sequence[LayerGeometry], group: range) -> LayerGeometry:
    """A group as one layer with all their heads."""
    first = layers[group[0]]
    return msgspec.structs.replace(
        first,
        num_kv_heads=first.num_kv_heads * len(group),
        num_query_heads=first.num_query_heads * len(group),
    )


class JoinedSums:
    """Adds the layers of one pass to the sums of their groups."""

    def __init__(
        self, spec: ModelSpec, groups: Sequence[range], sums: Sequence[MomentSums]
    ) -> None:
        """`groups` count the layers that store K and V; `sums` are theirs, and are mutated."""
        stored = spec.storing_layers
        self._groups = [[stored[place] for place in group] for group in groups]
        self._sums = sums
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """A layer's keys before rotation, and its values. Counted in with the last layer of a
        group; kept till then."""
        if not any(layer in group for group in self._groups):
            return
        self._seen[layer] = (k_TKD.clone(), v_TKD.clone())
        for group, sums in zip(self._groups, self._sums, strict=True):
            if layer == group[-1]:
                keys, values = (
                    torch.cat(arrays, dim=1)
                    for arrays in zip(*(self._seen[member] for member in group), strict=True)
                )
                sums.add(keys.new_zeros(1, *keys.shape[1:]), keys, values)
        awaited = [group for group in self._groups if group[-1] > layer]
        self._seen = {
            seen: arrays
            for seen, arrays in self._seen.items()
            if any(seen in group for group in awaited)
        }


def fit_group(
    group: range,
    moments: LayerMoments,
    weights: Sequence[ErrorWeights],
    *,
    scale: float,
    largest_rank: int | None = None,
) -> GroupCalibration:
    """The bases of a group. `weights` of each of its layers; `scale` as in `fit_keys`.

    Raises: ConfigError when the text was too short.
    """
    outputs = [weight.output_KDD for weight in weights if weight.output_KDD is not None]
    widths = (len(moments.keys.mean_F), len(moments.values.mean_F))
    k_rank, v_rank = (min(largest_rank or width, width) for width in widths)
    weighted = replace(moments, query_KDD=torch.cat([weight.query_KDD for weight in weights]))
    return GroupCalibration(
        group,
        fit_keys(weighted, rank=k_rank, scale=scale),
        fit_values(moments, rank=v_rank, output_KDD=torch.cat(outputs) if outputs else None),
    )
