"""Array codec `Sections`: parts of every head, each by itself through an array codec.

A codec that wants head dimensions of a certain kind writes others cut into such: `Rotated` takes
powers of two, so a head of 576 numbers is written as one of 512 and one of 64. In multi-head latent
attention these are the latent and the rotary key, which differ in size and get their own scales.
The directions of a latent get as many bits as they are worth (`filling.py`), a section for each
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, Plane
from kvcluster.codec.checks import shape_of_blocks


@dataclass(frozen=True)
class Sections:
    """Nothing is stored but what the codec of each section stores of it."""

    codecs: tuple[ArrayCodec, ...]
    """Of the sections, in order."""
    dims: tuple[int, ...]
    """Likewise; together the head dimension."""

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        """The planes of the first section, named `0.NAME`, then those of the second, ..."""
        if shape.dim != sum(self.dims):
            raise ValueError(f"the head dimension must be {sum(self.dims)}, not {shape.dim}")
        return tuple(
            plane._replace(name=f"{index}.{plane.name}")
            for index, planes in enumerate(self._planes_of_sections(shape))
            for plane in planes
        )

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        self.planes(shape_of_blocks(x_BKSD, positions_BS))
        parts = torch.split(x_BKSD, list(self.dims), dim=-1)
        return tuple(
            plane
            for codec, part in zip(self.codecs, parts, strict=True)
            for plane in codec.encode(part, positions_BS)
        )

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        # How many planes a section has is a matter of its codec, not of the number of heads.
        shape = BlockShape(1, positions_BS.shape[1], sum(self.dims))
        counts = [len(declared) for declared in self._planes_of_sections(shape)]
        if len(planes) != sum(counts):
            raise ValueError(f"these sections have {sum(counts)} planes, not {len(planes)}")
        of_sections = iter(planes)
        parts = [
            codec.decode(list(islice(of_sections, count)), positions_BS)
            for codec, count in zip(self.codecs, counts, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def _planes_of_sections(self, shape: BlockShape) -> list[tuple[Plane, ...]]:
        return [
            codec.planes(shape._replace(dim=dim))
            for codec, dim in zip(self.codecs, self.dims, strict=True)
        ]


def powers_of_two(number: int) -> tuple[int, ...]:
    """The powers of two that it is the sum of, the largest first."""
    return tuple(1 << bit for bit in reversed(range(number.bit_length())) if number >> bit & 1)
