"""Selection `estimated`: each query head picks the blocks that look worth reading (after the
block-sparse heads of MInference, arXiv 2407.02490).

The mean of a query block's queries stands for all of them. A key block's score is its product with
the mean of the block's keys or, with `by="bound"`, the largest product that a key between the
block's least and largest numbers could have. A query block is the rows of the prompt in one block,
so prefill chunks must begin with blocks; a row of the output is a query block of one.

Shape letters: J query blocks, B blocks, G heads that choose (here the H query heads), D head
dimension.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvcluster.selection.base import KeySummaries, QueryBlocks, Ranking, upper_bounds
from kvcluster.selection.need import Need
from kvcluster.selection.offered import BY
from kvcluster.types import LayerGeometry


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """Reads a share of the blocks, rounded up; the first and latest ones are among them."""

    name: ClassVar[str] = "estimated"
    chooses_in_prompt: ClassVar[bool] = True

    share: float
    """Of the blocks up to the query's own."""
    sinks: int = 1
    """First blocks that are always read."""
    local: int = 2
    """Latest blocks that are always read, the query's own included."""
    by: Literal["mean", "bound"] = "mean"
    block_size: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"share is of the blocks: give a number over 0 and up to 1, not {self.share}"
            )
        if self.sinks < 0 or self.local < 1:
            raise ValueError(
                "give 0 or more sinks and 1 or more local blocks (the query's own counts), "
                f"not {self.sinks} and {self.local}"
            )
        if self.by not in BY:
            raise ValueError(f"by must be mean or bound, not {self.by}")

    @property
    def needs(self) -> Need:
        """See `BlockSelection`."""
        return BY[self.by]

    def covers(self, num_blocks: int) -> bool:
        """See `BlockSelection`."""
        return self.share == 1 or num_blocks <= self.local

    def num_choosing(self, geometry: LayerGeometry) -> int:
        """See `BlockSelection`."""
        return geometry.num_query_heads

    def scores(
        self,
        geometry: LayerGeometry,  # noqa: ARG002
        q_JHD: Tensor,
        keys: KeySummaries,
    ) -> Tensor:
        """See `BlockSelection`."""
        if self.by == "bound":
            return upper_bounds(q_JHD, keys).float()
        num_sharing = q_JHD.shape[1] // len(keys.mean_KBD)
        mean_HBD = keys.mean_KBD.double().repeat_interleave(num_sharing, dim=0)
        return torch.einsum("jhd,hbd->hjb", q_JHD, mean_HBD).float()

    def ranking(self, blocks: QueryBlocks, readable_JB: Tensor) -> Ranking:
        """See `BlockSelection`."""
        blocks_B = torch.arange(readable_JB.shape[1], device=readable_JB.device)
        always_JB = (blocks_B < self.sinks) | (blocks_B > blocks.own_J[:, None] - self.local)
        always_JB &= readable_JB
        wanted_J = torch.tensor(
            [math.ceil(Fraction(repr(self.share)) * n) for n in readable_JB.sum(dim=1).tolist()],
            device=blocks_B.device,
        )
        return Ranking(always_JB, wanted_J - always_JB.sum(dim=1))

    def choose(
        self,
        layer: int,  # noqa: ARG002
        blocks: QueryBlocks,
        readable_JB: Tensor,
        score_GJB: Tensor,
    ) -> Tensor:
        """See `BlockSelection`."""
        return self.ranking(blocks, readable_JB).picked(score_GJB, readable_JB)
