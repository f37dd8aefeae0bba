"""Array codec `Sections`: parts of every head, each by itself through one array codec.

A codec that wants head dimensions of a certain kind writes others cut into such: `Rotated` takes
powers of two, so a head of 576 numbers is written as one of 512 and one of 64. In multi-head latent
attention these are the latent and the rotary key, which differ in size and get their own scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, Plane
from kvcluster.codec.checks import shape_of_blocks


@dataclass(frozen=True)
class Sections:
    """Nothing is stored but what the codec stores of each section."""

    codec: ArrayCodec
    dims: tuple[int, ...]
    """Of the sections, in order; together the head dimension."""

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        """The planes of the first section, named `0.NAME`, then those of the second, ..."""
        if shape.dim != sum(self.dims):
            raise ValueError(f"the head dimension must be {sum(self.dims)}, not {shape.dim}")
        return tuple(
            plane._replace(name=f"{index}.{plane.name}")
            for index, dim in enumerate(self.dims)
            for plane in self.codec.planes(shape._replace(dim=dim))
        )

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        self.planes(shape_of_blocks(x_BKSD, positions_BS))
        parts = torch.split(x_BKSD, list(self.dims), dim=-1)
        return tuple(plane for part in parts for plane in self.codec.encode(part, positions_BS))

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        if len(planes) % len(self.dims):
            raise ValueError(
                f"{len(self.dims)} sections have as many planes each, not {len(planes)}"
            )
        # A section has as many planes as any other of the same codec.
        size = len(planes) // len(self.dims)
        parts = [
            self.codec.decode(planes[index * size : (index + 1) * size], positions_BS)
            for index in range(len(self.dims))
        ]
        return torch.cat(parts, dim=-1)


def powers_of_two(number: int) -> tuple[int, ...]:
    """The powers of two that it is the sum of, the largest first."""
    return tuple(1 << bit for bit in reversed(range(number.bit_length())) if number >> bit & 1)
