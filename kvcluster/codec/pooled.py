"""Array codec `PooledHeads`: KV heads of a layer stored as fewer, each read as a multiple of one.

Heads are put into groups. A group is stored as one head, a weighted sum of its members, by another
array codec, so in that codec's planes with P heads instead of K; a member is read as its scale
times the stored head. Groups and scales are not in the blocks.

    pooled_p = sum_k scale_k x_k / sum_k scale_k^2   over the heads k of group p
    x_k is read as scale_k pooled_p

That is the x nearest to the heads (least squares) that are multiples of each other with these
scales. Equal scales average the heads, as models are converted to fewer KV heads before they are
trained further (Ainslie et al. 2023, arXiv 2305.13245, section 2.1). Fitted scales are the best
there are: see `fit_pools`.

Rotary embedding turns all heads of a position by one linear map, and pooling is linear across
heads: pooled keys that are rotated are the rotated pooled keys, so nothing is rotated here.

Shape letters: B blocks, K KV heads, P pooled heads, S tokens of a block, D head dimension,
N number of groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, Plane
from kvcluster.codec.checks import shape_of_blocks
from kvcluster.codec.moments import Spread
from kvcluster.codec.rounding import MAX_HALF


@dataclass(frozen=True)
class HeadGroups:
    """Which heads are stored as one."""

    group_of: tuple[int, ...]
    """For each head the pooled one that it is part of, from 0; none is left out."""
    scales: tuple[float, ...]
    """For each head, how many times its pooled one it is."""

    def __post_init__(self) -> None:
        groups = set(self.group_of)
        scaled = {p for p, scale in zip(self.group_of, self.scales, strict=True) if scale}
        if groups != set(range(self.num_pooled)) or not groups or scaled != groups:
            raise ValueError(f"want groups from 0, each with a scale that is not 0, got {self}")
        if not all(map(math.isfinite, self.scales)):
            raise ValueError(f"want finite scales, got {self.scales}")

    @property
    def num_heads(self) -> int:
        return len(self.group_of)

    @property
    def num_pooled(self) -> int:
        return max(self.group_of, default=-1) + 1

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each head in the sum that is stored."""
        squares = [0.0] * self.num_pooled
        for group, scale in zip(self.group_of, self.scales, strict=True):
            squares[group] += scale**2
        return tuple(s / squares[p] for p, s in zip(self.group_of, self.scales, strict=True))


@dataclass(frozen=True)
class PooledHeads:
    """The heads of a block as groups, each stored as one head by `stored`."""

    stored: ArrayCodec
    heads: HeadGroups

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        if shape.num_heads != self.heads.num_heads:
            raise ValueError(
                f"these groups are of {self.heads.num_heads} heads, not of {shape.num_heads}"
            )
        return self.stored.planes(shape._replace(num_heads=self.heads.num_pooled))

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        """Contiguous planes. Numbers beyond the largest float16 count as that."""
        shape = shape_of_blocks(x_BKSD, positions_BS)
        self.planes(shape)
        bounded = x_BKSD.float().clamp(-MAX_HALF, MAX_HALF)
        pooled_BPSD = bounded.new_zeros(
            (len(x_BKSD), self.heads.num_pooled, shape.num_tokens, shape.dim)
        )
        # Head by head, so that the order of the sum is the same for every batch.
        members = zip(self.heads.group_of, self.heads.weights, strict=True)
        for head, (group, weight) in enumerate(members):
            pooled_BPSD[:, group] += bounded[:, head] * weight
        return self.stored.encode(pooled_BPSD, positions_BS)

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        pooled_BPSD = self.stored.decode(planes, positions_BS)
        if pooled_BPSD.shape[1] != self.heads.num_pooled:
            raise ValueError(
                f"want {self.heads.num_pooled} pooled heads, got {pooled_BPSD.shape[1]}"
            )
        scales_K = torch.tensor(self.heads.scales, device=pooled_BPSD.device)
        groups_K = torch.tensor(self.heads.group_of, device=pooled_BPSD.device)
        return pooled_BPSD[:, groups_K] * scales_K[:, None, None]


@dataclass(frozen=True, slots=True, eq=False)
class HeadPools:
    """The groups of one array of one layer, for every number of them, as a calibration found them.

    Row N - 1 of both is of N groups.
    """

    groups_NK: Tensor
    """int64; group of each head."""
    scales_NK: Tensor
    """float32; each head as a multiple of its pooled one."""

    def of(self, num_pooled: int) -> HeadGroups:
        """Raises: ValueError for more groups than heads, or none."""
        if not 1 <= num_pooled <= len(self.groups_NK):
            raise ValueError(f"want 1 to {len(self.groups_NK)} groups, got {num_pooled}")
        row = num_pooled - 1
        return HeadGroups(tuple(self.groups_NK[row].tolist()), tuple(self.scales_NK[row].tolist()))


def neighbours(num_heads: int, num_pooled: int) -> HeadGroups:
    """Groups of as many neighbouring heads each, which are averaged.

    Raises: ValueError unless the heads divide into so many groups.
    """
    if num_pooled < 1 or num_heads % num_pooled:
        raise ValueError(f"{num_heads} heads do not divide into {num_pooled} groups of one size")
    size = num_heads // num_pooled
    return HeadGroups(tuple(head // size for head in range(num_heads)), (1.0,) * num_heads)


def fit_pools(spread: Spread, num_heads: int) -> HeadPools:
    """Groups and scales that lose little of the heads' squares over the calibration text.

    Of the heads of one group, multiples of one vector lose least where the multiples are the
    leading eigenvector of the heads' Gram matrix E[x_j . x_k] (Eckart and Young 1936), and then the
    group's trace less that eigenvalue. From one group a head, the two groups that lose least
    together are made one, until there is one: a greedy search that finds heads which are multiples
    of each other. Keys may be of before or after rotation, which keeps x_j . x_k.
    """
    moment_FF = spread.covariance_FF + torch.outer(spread.mean_F, spread.mean_F)
    dim = len(moment_FF) // num_heads
    gram_KK = torch.einsum("jdkd->jk", moment_FF.reshape(num_heads, dim, num_heads, dim))
    groups_NK = torch.empty(num_heads, num_heads, dtype=torch.int64)
    scales_NK = torch.empty(num_heads, num_heads, dtype=torch.float32)
    groups = [[head] for head in range(num_heads)]
    while True:
        for number, members in enumerate(groups):
            groups_NK[len(groups) - 1, members] = number
            scales_NK[len(groups) - 1, members] = _scales(gram_KK, members).float()
        if len(groups) == 1:
            return HeadPools(groups_NK, scales_NK)
        groups = _merged(gram_KK, groups)


def _merged(gram_KK: Tensor, groups: list[list[int]]) -> list[list[int]]:
    """The two groups that lose least together made one, in the place of the first."""
    pairs = [(a, b) for b in range(len(groups)) for a in range(b)]

    def added_loss(pair: tuple[int, int]) -> float:
        one, other = groups[pair[0]], groups[pair[1]]
        return _loss(gram_KK, one + other) - _loss(gram_KK, one) - _loss(gram_KK, other)

    first, second = min(pairs, key=added_loss)
    joined = sorted(groups[first] + groups[second])
    return [
        joined if place == first else members
        for place, members in enumerate(groups)
        if place != second
    ]


def _loss(gram_KK: Tensor, members: list[int]) -> float:
    inside = gram_KK[members][:, members]
    return float(inside.trace() - torch.linalg.eigvalsh(inside)[-1])


def _scales(gram_KK: Tensor, members: list[int]) -> Tensor:
    """Of mean square 1, the largest positive: heads that are alike have scales of 1."""
    values, vectors = torch.linalg.eigh(gram_KK[members][:, members])
    if not values[-1] > 0:
        return torch.ones(len(members), dtype=gram_KK.dtype)
    leading: Tensor = vectors[:, -1]
    return leading * leading[leading.abs().argmax()].sign() * math.sqrt(len(members))
