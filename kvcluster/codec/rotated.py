"""Array codec `Rotated`: a random rotation makes every vector's coordinates Gaussian, and a fixed
codebook for the Gaussian needs no scale but the norm (TurboQuant, arXiv 2504.19874).

Stored x is mean + scale * R^T codebook[codes], per token and KV head, with R = H diag(signs) /
sqrt(D), H the Hadamard matrix H[i, j] = (-1) ** popcount(i & j). So q . x is scale * (R q) .
codebook[codes] + q . mean, and a weighted sum of values is rotated back once.

The scale is |x - mean| / |codebook[codes]|: a decoded vector has the norm that it had.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvcluster.codec.array import BlockShape, Plane
from kvcluster.codec.checks import (
    check_one_of,
    check_planes,
    shape_of_blocks,
    shape_of_stored,
)
from kvcluster.codec.packing import (
    code_planes,
    num_code_planes,
    pack,
    unpack,
)
from kvcluster.codec.rounding import MAX_HALF, pairwise_sum, quotient

POSITIVE_LEVELS = {
    4: (
        0.128395030, 0.388048299, 0.656759119, 0.942340456,
        1.256231197, 1.618046386, 2.069017227, 2.732589571,
    ),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    2: (0.452780035, 1.510417608),
}  # fmt: skip
"""Upper half of the Lloyd-Max codebook of N(0, 1) by bits; the lower half mirrors it."""


@dataclass(frozen=True)
class Rotated:
    """2, 3 or 4 bits an element and a float16 per token. The head dimension is a power of two."""

    bits: int
    """Of a code: 4, 3 or 2."""

    centred: bool = False
    """Store each channel's mean over the block apart, for keys that share a large component."""

    transposed: bool = False
    """Pack codes [K, D, S] along tokens, as kernels read values; else [K, S, D] along channels."""

    def __post_init__(self) -> None:
        check_one_of("bits", self.bits, tuple(POSITIVE_LEVELS))

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        """Codes, then `scale` [K, S], then if centred `mean` [K, D]."""
        num_heads, num_tokens, dim = shape
        if dim < 8 or dim & (dim - 1):
            raise ValueError(f"the head dimension must be a power of two from 8 up, not {dim}")
        stored = (dim, num_tokens) if self.transposed else (num_tokens, dim)
        scale = Plane("scale", (num_heads, num_tokens), torch.float16)
        mean = Plane("mean", (num_heads, dim), torch.float16)
        codes = code_planes((num_heads, *stored), self.bits)
        return (*codes, scale, mean) if self.centred else (*codes, scale)

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        """Contiguous planes. Numbers beyond the largest float16 are stored as that."""
        shape = shape_of_blocks(x_BKSD, positions_BS)
        self.planes(shape)
        x = x_BKSD.float().clamp(-MAX_HALF, MAX_HALF)
        apart = []
        if self.centred:
            mean_BKD = quotient(pairwise_sum(x.transpose(2, 3)), shape.num_tokens)
            apart.append(mean_BKD.to(torch.float16))
            x = x - apart[0].float()[:, :, None]
        rotated = rotate(x)
        rms_BKS = (pairwise_sum(rotated.square()) / shape.dim).sqrt()
        unit = rotated / torch.where(rms_BKS > 0, rms_BKS, 1.0)[..., None]
        levels = codebook(self.bits, x.device)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        code_rms_BKS = (pairwise_sum(levels[codes].square()) / shape.dim).sqrt()
        scale_BKS = (rms_BKS / code_rms_BKS).clamp(max=MAX_HALF).to(torch.float16)
        stored = codes.to(torch.uint8)
        packed = pack(stored.transpose(2, 3) if self.transposed else stored, self.bits)
        return (*packed, scale_BKS, *apart)

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        num_code = num_code_planes(self.bits)
        stored = unpack(planes[:num_code], self.bits)
        codes = stored.transpose(2, 3) if self.transposed else stored
        check_planes(planes, self.planes(shape_of_stored(codes)), positions_BS)
        scale_BKS = planes[num_code].float()
        levels = codebook(self.bits, codes.device)
        x = rotate_back(levels[codes.int()].mul_(scale_BKS[..., None]))
        return x.add_(planes[num_code + 1].float()[:, :, None]) if self.centred else x

    def inner(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        """R x: what is stored, without the rotation back."""
        num_code = num_code_planes(self.bits)
        axes, places = ((1, 2, 0, 3), (2, 0, 3, 1)) if self.transposed else ((1, 0, 2, 3),) * 2
        codes = unpack([plane.permute(axes) for plane in planes[:num_code]], self.bits)
        levels = codebook(self.bits, codes.device)
        # In memory a head's tokens follow one another over all blocks.
        z_BKSD = levels.index_select(0, codes.flatten().int()).view(codes.shape).permute(places)
        check_planes(planes, self.planes(shape_of_stored(z_BKSD)), positions_BS)
        z_BKSD.mul_(planes[num_code].float()[..., None])
        if self.centred:
            z_BKSD.add_(self.fold(planes[num_code + 1])[:, :, None])
        return z_BKSD

    def fold(self, q_THD: Tensor) -> Tensor:
        return q_THD.float() @ _rotation(q_THD.shape[-1], q_THD.device).T

    def expand(self, out_THC: Tensor) -> Tensor:
        return out_THC.float() @ _rotation(out_THC.shape[-1], out_THC.device)


@lru_cache(maxsize=8)
def _rotation(dim: int, device: torch.device) -> Tensor:
    """The matrix R, a constant."""
    return rotate(torch.eye(dim, device=device)).T.contiguous()


def codebook(bits: int, device: torch.device) -> Tensor:
    """The 2 ** bits levels, ascending, float32: code c stands for level c."""
    upper = torch.tensor(POSITIVE_LEVELS[bits], device=device)
    return torch.cat([-upper.flip(0), upper])


def rotate(x: Tensor) -> Tensor:
    """R x along the last axis, whose length is a power of two."""
    return quotient(_hadamard(x * signs(x.shape[-1], x.device)), math.sqrt(x.shape[-1]))


def rotate_back(x: Tensor) -> Tensor:
    """R^T x along the last axis: undoes `rotate`."""
    return quotient(_hadamard(x) * signs(x.shape[-1], x.device), math.sqrt(x.shape[-1]))


def signs(dim: int, device: torch.device) -> Tensor:
    """The fixed diagonal of +1 and -1, float32: the lowest bit of a 32-bit hash of the channel.

    h = ((d + 1) * 0x9E3779B1) mod 2^32; h = ((h ^ (h >> 15)) * 0x2C1B3C6D) mod 2^32;
    the sign is -1 where h ^ (h >> 13) is odd.
    """
    hashed = (torch.arange(1, dim + 1, device=device) * 0x9E3779B1) & 0xFFFFFFFF
    hashed = ((hashed ^ (hashed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return 1.0 - 2.0 * ((hashed ^ (hashed >> 13)) & 1).float()


def _hadamard(x: Tensor) -> Tensor:
    """Additions in a fixed order, where a matrix product's order depends on the batch."""
    dim = x.shape[-1]
    last, following = x, torch.empty_like(x, memory_format=torch.contiguous_format)
    spare = torch.empty_like(following)
    width = 1
    while width < dim:
        pairs = (*x.shape[:-1], dim // (2 * width), 2, width)
        low, high = last.reshape(pairs).unbind(-2)
        low_sum, high_sum = following.view(pairs).unbind(-2)
        torch.add(low, high, out=low_sum)
        torch.sub(low, high, out=high_sum)
        last, following, spare = following, spare, following
        width *= 2
    return last
