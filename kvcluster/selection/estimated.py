"""Selection `estimated`: each query head picks the blocks that look worth reading, in prefill
(after the block-sparse heads of MInference, arXiv 2407.02490).

The mean of a query block's queries stands for all of them. A key block's score is its product with
the mean of the block's keys or, with `by="bound"`, the largest product that a key between the
block's least and largest numbers could have. A query block is the rows of one block that are
prefilled together, so prefill chunks must end with blocks; a decode row is a query block of one.

Shape letters: T query tokens, J query blocks, B blocks, H query heads, K KV heads, D head
dimension.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvcluster.selection.base import KeySummaries, Rows, pick_best, query_blocks, upper_bounds
from kvcluster.types import LayerGeometry


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """Reads a share of the blocks, rounded up; the first and latest ones are among them."""

    name: ClassVar[str] = "estimated"

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
        if self.by not in ("mean", "bound"):
            raise ValueError(f"by must be mean or bound, not {self.by}")

    def reads(
        self,
        layer: int,  # noqa: ARG002
        geometry: LayerGeometry,  # noqa: ARG002
        rows: Rows,
        keys: KeySummaries,
    ) -> Tensor:
        """See `BlockSelection`."""
        runs = query_blocks(rows.own_T)
        q_mean_JHD = torch.segment_reduce(
            rows.q_THD.float().contiguous(), "mean", lengths=runs.num_rows_J, axis=0
        )
        readable_JB = rows.readable_TB[runs.num_rows_J.cumsum(0) - 1]
        blocks_B = torch.arange(readable_JB.shape[1], device=readable_JB.device)
        always_JB = (blocks_B < self.sinks) | (blocks_B > runs.own_J[:, None] - self.local)
        always_JB &= readable_JB
        wanted_J = torch.tensor(
            [math.ceil(Fraction(repr(self.share)) * n) for n in readable_JB.sum(dim=1).tolist()],
            device=blocks_B.device,
        )
        free_JB = readable_JB & ~always_JB
        score_HJB = self._scores(q_mean_JHD, keys)
        picked_HJB = pick_best(score_HJB, free_JB, wanted_J - always_JB.sum(dim=1))
        return (picked_HJB | always_JB)[:, runs.place_T]

    def _scores(self, q_JHD: Tensor, keys: KeySummaries) -> Tensor:
        if self.by == "bound":
            return upper_bounds(q_JHD, keys)
        num_sharing = q_JHD.shape[1] // len(keys.mean_KBD)
        mean_HBD = keys.mean_KBD.repeat_interleave(num_sharing, dim=0)
        return torch.einsum("jhd,hbd->hjb", q_JHD, mean_HBD)
