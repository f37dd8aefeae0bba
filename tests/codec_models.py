"""The codecs of models that exist in tests only."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster.codec.calibration import (
    Calibration,
    GroupCalibration,
    LayerCalibration,
    LayerPools,
    fit_keys,
    fit_values,
)
from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.codec.moments import MomentSums
from kvcluster.codec.pooled import fit_pools
from kvcluster.codec.registry import CODECS
from kvcluster.model.rotary import Pairing, Rotary
from kvcluster.quality.joined_moments import groups_of, side_by_side
from kvcluster.types import EXACT, LayerGeometry, ModelSpec
from tests.scripted_model import ScriptedModel

CPU = torch.device("cpu")
PLAIN = sorted(set(CODECS) - {"latent"})
LATENT = (
    "latent:r=0.5",
    "latent:r=0.5,bits=8,values=exact",
    "latent:r=0.5,bits=4,values=rotated3,ranks=adaptive",
    "latent:r=0.25,bits=3,keys=int4,windowed=int8",
    "latent:r=0.25,value_r=0.5,bits=4,ranks=filled",
    "latent:r=0.5,value_r=0.75,bits=4,value_bits=2,codes=rotated",
)
JOINED = (
    "latent:r=0.25,layers=2",
    "latent:r=0.25,bits=4,values=rotated3,ranks=adaptive,layers=3",
    "latent:r=0.5,bits=8,keys=int4,windowed=int8,layers=2",
    "latent:r=0.25,value_r=0.5,bits=4,ranks=filled,scale_bits=8,layers=2",
)
"""Latents of several layers, which some models have."""
EVERY_CODEC = (
    EXACT,
    *PLAIN,
    *LATENT,
    "int4:key_group=16,scale_bits=8,values=rotated3",
    "int3:value_group=16,windowed=exact",
)
"""Every method, and combinations of their parameters."""
POOLED = (
    "pooled + exact",
    "pooled + int8",
    "pooled:by=learned + int4",
    "pooled:by=learned + exact",
    "pooled + int3:value_group=16,windowed=exact",
)
"""Heads grouped, and the groups written by a codec."""
EVERY_STORAGE = (*EVERY_CODEC, *POOLED)
"""All that a `Policy.storage` can be."""
MIXES_HEADS = (*LATENT, *POOLED)
"""Of those, what writes the heads of a token together."""


class Served(NamedTuple):
    """A model that is served, and the codecs it has."""

    model: ScriptedModel
    codecs: ModelCodecs


def plain_codecs(spec: ModelSpec) -> ModelCodecs:
    """Those that need no calibration."""
    return ModelCodecs(CodecModel(spec=spec, device=CPU))


def calibrated_codecs(spec: ModelSpec, device: torch.device = CPU) -> ModelCodecs:
    """All of them, with bases of random directions."""
    return ModelCodecs(
        CodecModel(
            spec=spec,
            device=device,
            calibration=calibration_of(spec),
            rotations=[_rotary(layer) for layer in spec.layers],
        )
    )


def calibration_of(spec: ModelSpec) -> Calibration:
    """Bases of all directions of random keys and values, of up to three layers together."""
    stored = [spec.layers[index] for index in spec.storing_layers]
    return Calibration(
        weights_digest=spec.weights_digest,
        text_digests=(),
        num_tokens=1024,
        layers=tuple(_layer(layer, seed) for seed, layer in enumerate(stored)),
        groups=tuple(
            _group(group, side_by_side(stored, group)) for group in groups_of(stored, (2, 3))
        ),
    )


def _group(group: range, whole: LayerGeometry) -> GroupCalibration:
    fitted = _layer(whole, seed=100 + group[0])
    return GroupCalibration(group, fitted.keys, fitted.values)


def _layer(layer: LayerGeometry, seed: int) -> LayerCalibration:
    generator = torch.Generator().manual_seed(seed)
    # Bases want four tokens for each direction.
    widest = max(layer.key_dim, layer.value_dim) * layer.num_kv_heads
    num_tokens = max(1024, 4 * widest)

    def tokens(heads: int, dim: int) -> Tensor:
        # Channels of different sizes, so that layers want different ranks.
        sizes = torch.rand(dim, generator=generator)
        return torch.randn(num_tokens, heads, dim, generator=generator) * sizes

    sums = MomentSums(layer.num_kv_heads, layer.key_dim, layer.value_dim)
    sums.add(
        tokens(layer.num_query_heads, layer.key_dim),
        tokens(layer.num_kv_heads, layer.key_dim),
        tokens(layer.num_kv_heads, layer.value_dim),
    )
    moments = sums.moments()
    return LayerCalibration(
        fit_keys(moments, rank=layer.num_kv_heads * layer.key_dim),
        fit_values(moments, rank=layer.num_kv_heads * layer.value_dim),
        LayerPools(
            fit_pools(moments.keys, layer.num_kv_heads),
            fit_pools(moments.values, layer.num_kv_heads),
        ),
    )


def _rotary(layer: LayerGeometry) -> Rotary:
    inverse_F = 1000.0 ** -torch.linspace(0, 1, layer.key_dim // 2)
    return Rotary(
        inverse_frequencies_F=inverse_F, scaling=1.0, first_dim=0, pairing=Pairing.HALF_SPLIT
    )
