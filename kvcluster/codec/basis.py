"""A latent basis: two matrices and a mean that turn the numbers of a token into a few, and back.

`codec/calibration.py` fits bases and keeps them in a file.

Shape letters: F = KV heads * head dimension, C latent dimension.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

SMALLEST_SIZE: Final = 1e-3
"""Smallest standard deviation that a latent is divided by, as a share of the largest: a direction
that never moved in the calibration text may move later, and must not overflow float16."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Basis:
    """Best directions of one array of one layer, most important first."""

    mean_F: Tensor
    down_FC: Tensor
    """latent = (x - mean) @ down. Each latent has unit variance over the calibration text, as far
    as its direction moved there."""
    up_CF: Tensor
    """x = mean + latent @ up."""
    spectrum_F: Tensor
    """Error that each direction saves, over all ranks (more than C of them), float64."""

    @property
    def rank(self) -> int:
        return int(self.up_CF.shape[0])

    def prefix(self, rank: int) -> "Basis":
        """The best basis of a lower rank; shares memory. Raises: ValueError."""
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank: want 1 to {self.rank}, got {rank}")
        return Basis(
            mean_F=self.mean_F,
            down_FC=self.down_FC[:, :rank],
            up_CF=self.up_CF[:rank],
            spectrum_F=self.spectrum_F,
        )

    def sizes(self) -> Tensor:
        """How far the numbers of a token stray in each direction, as its errors count: what a
        latent is multiplied with on the way back, beside a direction of length 1. [C], float32."""
        largest = self.spectrum_F[0] if self.spectrum_F[0] > 0 else torch.ones(())
        smallest = largest.double() * SMALLEST_SIZE**2
        return self.spectrum_F[: self.rank].clamp_min(smallest).sqrt().to(self.up_CF)

    def to(self, device: torch.device) -> "Basis":
        """The same on a device, for codecs that run there."""
        return Basis(
            mean_F=self.mean_F.to(device),
            down_FC=self.down_FC.to(device),
            up_CF=self.up_CF.to(device),
            spectrum_F=self.spectrum_F,
        )
