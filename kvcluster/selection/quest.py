"""Selection `quest`: each query reads the blocks that could hold its largest logits, in decode
(Quest, arXiv 2406.10774).

A block is known by the least and the largest number of its keys in each dimension. No key of it can
have a larger product with a query than the sum, over dimensions, of the larger of the two products.
A KV head reads what its query heads want together: a block's score is the largest bound of any of
them, so a kernel reads shared blocks once. Beside the paper's, the first and the latest blocks are
always read: bounds of blocks as large as ours rank them too low.

Shape letters: T query tokens, B blocks, H query heads, K KV heads.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcluster.selection.base import KeySummaries, Rows, pick_best, upper_bounds
from kvcluster.types import LayerGeometry


@dataclass(frozen=True, kw_only=True)
class Quest:
    """Reads the first blocks, the latest ones, and the best of the others."""

    name: ClassVar[str] = "quest"

    tokens: int
    """What a query reads at most: whole blocks, the first and the latest ones among them."""
    sinks: int = 1
    """First blocks that are always read."""
    local: int = 2
    """Latest blocks that are always read, the query's own included."""
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.local < 1:
            raise ValueError(
                "give 0 or more sinks and 1 or more local blocks (the query's own counts), "
                f"not {self.sinks} and {self.local}"
            )
        least = (self.sinks + self.local) * self.block_size
        if self.tokens < least or self.tokens % self.block_size:
            raise ValueError(
                f"tokens must be a multiple of the block size, {self.block_size}, and hold the "
                f"blocks that are always read: give {least} or more, not {self.tokens}"
            )

    def reads(
        self,
        layer: int,  # noqa: ARG002
        geometry: LayerGeometry,
        rows: Rows,
        keys: KeySummaries,
    ) -> Tensor:
        """See `BlockSelection`."""
        # The sign of the scale is the model's affair; a soft-cap changes no order.
        bound_HTB = upper_bounds(rows.q_THD.float() * geometry.scale, keys)
        num_rows, num_blocks = rows.readable_TB.shape
        score_KTB = bound_HTB.reshape(len(keys.low_KBD), -1, num_rows, num_blocks).amax(dim=1)
        blocks_B = torch.arange(num_blocks, device=score_KTB.device)
        always_TB = (blocks_B < self.sinks) | (blocks_B > rows.own_T[:, None] - self.local)
        always_TB &= rows.readable_TB
        num_T = self.tokens // self.block_size - always_TB.sum(dim=1)
        return pick_best(score_KTB, rows.readable_TB & ~always_TB, num_T) | always_TB
