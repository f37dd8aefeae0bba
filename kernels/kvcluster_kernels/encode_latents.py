"""Encodes blocks as latents of all KV heads (codecs `LatentKeys` and `LatentValues`): projected,
then written as numbers of 16 bits or as integers, without the latents of all blocks beside them.

The projection must come out the same whatever blocks are beside a block, so it is a product of
whole numbers that float64 adds without rounding: matrix units multiply these as well, by way of
PyTorch. Keys are to be given as they were before they were turned.

Shape letters: those of `encode_blocks.py`; F = K * D, C latent dimension.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster_kernels.encode_blocks import Blocks
from kvcluster_kernels.encode_floats import encode_halves
from kvcluster_kernels.encode_integers import IntegerFormat, encode_integers

_DOUBLE_BITS = 53
_ROW_BITS = 23
_MAX_HALF = 65504.0


class LatentProjection(NamedTuple):
    """latent = (x - mean) @ down, in whole numbers of powers of two."""

    mean_F: Tensor
    steps_FC: Tensor
    """float64, whole numbers."""
    unit_C: Tensor
    """float64: what a step of each direction stands for."""

    @classmethod
    def of(cls, down_FC: Tensor, mean_F: Tensor) -> "LatentProjection":
        """To be made once for a layer, on the device of its blocks. Each direction is rounded to as
        many bits as leave every sum of products with rows of 23 bits below 2^53."""
        bits = _DOUBLE_BITS - _ROW_BITS - math.ceil(math.log2(len(down_FC) + 1))
        unit_C = _units(down_FC.T, bits)
        return cls(mean_F, (down_FC.double() / unit_C).round(), unit_C)

    def latents(self, x_BKSD: Tensor) -> Tensor:
        """latent_B1SC, float32."""
        x_BSF = x_BKSD.float().clamp(-_MAX_HALF, _MAX_HALF).transpose(1, 2).flatten(2)
        centred_BSF = x_BSF - self.mean_F
        unit_BS1 = _units(centred_BSF, _ROW_BITS)[..., None]
        steps_BSC = (centred_BSF.double() / unit_BS1).round() @ self.steps_FC
        return (steps_BSC * unit_BS1 * self.unit_C).float()[:, None]


def encode_latents(
    blocks: Blocks,
    projection: LatentProjection,
    form: IntegerFormat | None,
    planes: tuple[Tensor, ...],
) -> None:
    """Write blocks into `planes`, `[pages, N, 1, ...]` of what the codec stores: of numbers of 16
    bits where there is no `form`.

    Raises: ValueError for planes of another shape.
    """
    latents = Blocks(projection.latents(blocks.x_BKSD), blocks.block_ids_B)
    if form is None:
        encode_halves(latents, planes[0])
    else:
        encode_integers(latents, form, planes)


def _units(x: Tensor, bits: int) -> Tensor:
    """A power of two, float64, of which no number along the last axis has more than 2^bits."""
    largest = x.float().abs().amax(dim=-1)
    exponent = (largest.view(torch.int32) + 0x7FFFFF) >> 23
    power = (exponent.clamp(min=1) << 23).view(torch.float32)
    return power.double() * 2.0**-bits
