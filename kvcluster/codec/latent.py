"""Array codecs `LatentKeys` and `LatentValues`: all KV heads of a layer as one short latent.

Low-rank (latent) compression, which the field also calls multi-head compression: the keys or the
values of a token, all heads side by side, are projected on the leading directions of a basis that
calibration fitted (`codec/calibration.py`). Keys are projected as they were before rotation, where
they are of lower rank, and rotated again when they are read.

Stored is the latent as one head [1, S, C], as float16 (`ExactArray`: plane `x`) or quantized per
direction in groups of tokens (`ChannelQuantizer`: its planes, documented there; with `grades`, a
section of directions for each width); no mean, which is in the basis. To read keys: latent, times
`up`, plus mean, rotated to the token's position.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension, F = K * D, C latent
dimension, T tokens, H query heads, I and J rows and columns of a matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, Plane
from kvcluster.codec.basis import Basis
from kvcluster.codec.checks import shape_of_blocks
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.filling import Grade
from kvcluster.codec.inner import Decoded, inner_values
from kvcluster.codec.quantized import ChannelQuantizer
from kvcluster.codec.rotated import Rotated
from kvcluster.codec.rounding import MAX_HALF, power_of_two_at_least
from kvcluster.codec.sections import Sections, powers_of_two

_DOUBLE_BITS: Final = 53
_ROW_BITS: Final = 23


class Rotation(Protocol):
    """How a layer turns its keys by position. Both return float32 in new memory."""

    def apply(self, x_BKSD: Tensor, positions_BS: Tensor) -> Tensor: ...

    def undo(self, x_BKSD: Tensor, positions_BS: Tensor) -> Tensor: ...


class RotatedPairs(NamedTuple):
    """A rotation that turns pairs of channels by position times frequency."""

    inverse_frequencies_E: Tensor
    """Radians per position of each pair, float32."""
    scaling: float
    """Factor on the channels that are turned."""
    first_dim: int
    """Channels before it, and those behind the last pair, are left alone."""
    is_interleaved: bool
    """Pairs are neighbours, instead of channels half of the turned ones apart."""


@runtime_checkable
class PairRotation(Rotation, Protocol):
    """A rotation that kernels can do themselves."""

    @property
    def pairs(self) -> RotatedPairs:
        """On the device of the model."""
        ...


@dataclass(frozen=True, slots=True)
class LatentStorage:
    """How latents are written."""

    bits: int | None = None
    """Of a number; None for float16."""
    is_rotated: bool = False
    """Codes of a rotated latent (`Rotated`: 4, 3 or 2 bits and one scale a token) instead of
    `ChannelQuantizer`'s."""
    group: int = 64
    """As in `ChannelQuantizer`, and used by it alone."""
    scale_bits: int = 16
    """Likewise."""
    grades: tuple[Grade, ...] = ()
    """Instead of `bits`: those of the leading directions, then of the next, ..."""

    def codec(self, rank: int) -> ArrayCodec:
        """Of the latent as one head. Raises: ValueError where `grades` are not of this rank, or
        rotated codes do not fit it."""
        sections: list[tuple[int | None, int]] = [(self.bits, rank)]
        if self.grades:
            sections = [(grade.bits, grade.num_directions) for grade in self.grades]
        if sum(dim for _, dim in sections) != rank:
            raise ValueError(f"want grades of {rank} directions, got {self.grades}")
        parts = [part for bits, dim in sections for part in self._parts(bits, dim)]
        if len(parts) == 1:
            return parts[0][0]
        return Sections(tuple(codec for codec, _ in parts), tuple(dim for _, dim in parts))

    def scale_share(self, rank: int) -> float:
        """Bits that scales add to each number of a latent that is written in one section."""
        return 16 / rank if self.is_rotated else 2 * self.scale_bits / self.group

    def _parts(self, bits: int | None, dim: int) -> list[tuple[ArrayCodec, int]]:
        if bits is None:
            return [(ExactArray(torch.float16), dim)]
        if not self.is_rotated:
            return [(ChannelQuantizer(bits, group=self.group, scale_bits=self.scale_bits), dim)]
        if dim % 8:
            raise ValueError(f"rotated codes want a multiple of 8 directions, not {dim}")
        return [(Rotated(bits), part) for part in powers_of_two(dim)]


class LatentValues:
    """Values as latents: C numbers for a token of a layer instead of K * D.

    The way back is linear, so attention may weigh latents instead of values and call `expand` once
    for a query: that reads C / F of the memory and never builds a value.
    """

    def __init__(
        self,
        basis: Basis,
        *,
        num_heads: int,
        rank: int,
        storage: LatentStorage = LatentStorage(),
    ) -> None:
        """`basis` must be on the device of the blocks.

        Raises: ValueError for a rank that the basis does not have, or heads that do not divide it.
        """
        basis = basis.prefix(rank)
        width = len(basis.mean_F)
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"{width} numbers of a token do not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.dim = width // num_heads
        self.rank = rank
        self.basis = basis
        """Of this rank."""
        self._down = _FixedPointMatrix(basis.down_FC)
        self._up = _FixedPointMatrix(basis.up_CF)
        self.stored = storage.codec(rank)
        """Writes a latent as one head."""
        # What is inside a rotated latent is no latent yet.
        is_rotated = isinstance(self.stored, Rotated)
        self._read = Decoded(self.stored) if is_rotated else inner_values(self.stored)

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        if (shape.num_heads, shape.dim) != (self.num_heads, self.dim):
            raise ValueError(
                f"this basis is of {self.num_heads} heads of {self.dim} channels, "
                f"not of {shape.num_heads} of {shape.dim}"
            )
        return self.stored.planes(BlockShape(1, shape.num_tokens, self.rank))

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        """Contiguous planes. Numbers beyond the largest float16 count as that."""
        self.planes(shape_of_blocks(x_BKSD, positions_BS))
        x_BSF = _bounded(x_BKSD).transpose(1, 2).flatten(2)
        latent_BSC = self._down.product(x_BSF - self.basis.mean_F)
        return self.stored.encode(latent_BSC[:, None], positions_BS)

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        latent_BSC = self.stored.decode(planes, positions_BS)[:, 0]
        x_BSF = self._up.product(latent_BSC) + self.basis.mean_F
        x_BSKD = x_BSF.reshape(*x_BSF.shape[:2], self.num_heads, self.dim)
        return x_BSKD.transpose(1, 2).contiguous()

    def inner(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        """latent_B1SC, which all heads share: what is stored, without the way back."""
        return self._read.inner(planes, positions_BS)

    def approximate(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        """x_BKSD to the rounding of float32: `decode` whose last bits depend on the batch."""
        latent_BSC = self.inner(planes, positions_BS)[:, 0]
        x_BSF = torch.addmm(self.basis.mean_F, latent_BSC.flatten(0, 1), self.basis.up_CF)
        x_BSKD = x_BSF.reshape(*latent_BSC.shape[:2], self.num_heads, self.dim)
        return x_BSKD.transpose(1, 2)

    def expand(self, out_THC: Tensor) -> Tensor:
        """out_THD of weighted sums of latents: each query head gets its KV head's channels.

        The weights of a sum must add up to 1, for the mean is added once: expand a row that has
        seen no key, which is zero by definition, and it is zero no more.
        """
        num_tokens, num_query_heads, _ = out_THC.shape
        up_CKD = self.basis.up_CF.reshape(self.rank, self.num_heads, self.dim)
        mean_KD = self.basis.mean_F.reshape(self.num_heads, self.dim)
        num_sharing = num_query_heads // self.num_heads
        out_TKGC = out_THC.float().reshape(num_tokens, self.num_heads, num_sharing, self.rank)
        out_TKGD = torch.einsum("tkgc,ckd->tkgd", out_TKGC, up_CKD) + mean_KD[:, None]
        return out_TKGD.reshape(num_tokens, num_query_heads, self.dim)


class LatentKeys:
    """Keys as latents of what they were before rotation."""

    def __init__(
        self,
        basis: Basis,
        *,
        num_heads: int,
        rank: int,
        rotation: Rotation | None,
        storage: LatentStorage = LatentStorage(),
    ) -> None:
        """As `LatentValues`; `rotation` is the layer's, None where it has none."""
        self._unrotated = LatentValues(basis, num_heads=num_heads, rank=rank, storage=storage)
        self.rotation = rotation

    @property
    def rank(self) -> int:
        return self._unrotated.rank

    @property
    def basis(self) -> Basis:
        """Of this rank, of keys before rotation."""
        return self._unrotated.basis

    @property
    def stored(self) -> ArrayCodec:
        """Writes a latent as one head."""
        return self._unrotated.stored

    @property
    def unrotated(self) -> LatentValues:
        """Writes keys that were never rotated."""
        return self._unrotated

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        return self._unrotated.planes(shape)

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        shape = shape_of_blocks(x_BKSD, positions_BS)
        if self.rotation is not None:
            self.planes(shape)
            x_BKSD = self.rotation.undo(_bounded(x_BKSD), positions_BS)
        return self._unrotated.encode(x_BKSD, positions_BS)

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        x_BKSD = self._unrotated.decode(planes, positions_BS)
        if self.rotation is None:
            return x_BKSD
        return self.rotation.apply(x_BKSD, positions_BS)

    def inner(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        """The keys, to the rounding of float32."""
        x_BKSD = self._unrotated.approximate(planes, positions_BS)
        if self.rotation is None:
            return x_BKSD
        return self.rotation.apply(x_BKSD, positions_BS)

    def fold(self, q_THD: Tensor) -> Tensor:
        return q_THD.float()


def _bounded(x_BKSD: Tensor) -> Tensor:
    """Sums of numbers near the largest float32 would overflow."""
    return x_BKSD.float().clamp(-MAX_HALF, MAX_HALF)


class _FixedPointMatrix:
    """A matrix whose products come out the same whatever rows are beside a row.

    A float product depends on the order of its sums, which depends on the shape of the batch. Here
    each row is rounded to 23 bits under its largest number and the matrix to as many bits as leave
    every sum below 2^53: float64 then adds without rounding, in any order, on any device.
    """

    def __init__(self, matrix_IJ: Tensor) -> None:
        matrix_bits = _DOUBLE_BITS - _ROW_BITS - math.ceil(math.log2(len(matrix_IJ) + 1))
        self._unit_J = _unit(matrix_IJ.T, matrix_bits)
        self._steps_IJ = (matrix_IJ.double() / self._unit_J).round()

    def product(self, x_BSI: Tensor) -> Tensor:
        """x @ matrix, float32; relative error about 1e-6 of the sum of magnitudes."""
        unit_BS = _unit(x_BSI, _ROW_BITS)[..., None]
        steps_BSJ = (x_BSI.double() / unit_BS).round() @ self._steps_IJ
        return (steps_BSJ * unit_BS * self._unit_J).float()


def _unit(x: Tensor, bits: int) -> Tensor:
    """A power of two, float64, of which no number along the last axis has more than 2^bits."""
    return power_of_two_at_least(x.float().abs().amax(dim=-1)).double() * 2.0**-bits
