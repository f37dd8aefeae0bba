"""Selection `quest`: each query reads the blocks that could hold its largest logits, in decode
(Quest, arXiv 2406.10774).

A block is known by the least and the largest number of its keys in each dimension. No key of it can
have a larger product with a query than the sum, over dimensions, of the larger of the two products.
A KV head reads what its query heads want together: a block's score is the largest bound of any of
them, so a kernel reads shared blocks once. Beside the paper's, the first and the latest blocks are
always read: bounds of blocks as large as ours rank them too low.

Rows of the prompt read everything: the saving is that of decode, where reading the cache is the
cost. So keys and values of a prompt are those that they would be without a selection.

Shape letters: J query blocks, B blocks, G heads that choose (here the K KV heads), H query heads,
D head dimension.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcluster.selection.base import KeySummaries, QueryBlocks, Ranking, upper_bounds
from kvcluster.selection.need import Need
from kvcluster.types import LayerGeometry


@dataclass(frozen=True, kw_only=True)
class Quest:
    """Reads the first blocks, the latest ones, and the best of the others."""

    name: ClassVar[str] = "quest"
    needs: ClassVar[Need] = Need.BOUNDS
    chooses_in_prompt: ClassVar[bool] = False

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

    def covers(self, num_blocks: int) -> bool:
        """See `BlockSelection`."""
        return num_blocks * self.block_size <= self.tokens

    def num_choosing(self, geometry: LayerGeometry) -> int:
        """See `BlockSelection`."""
        return geometry.num_kv_heads

    def scores(self, geometry: LayerGeometry, q_JHD: Tensor, keys: KeySummaries) -> Tensor:
        """See `BlockSelection`."""
        # The sign of the scale is the model's affair; a soft-cap changes no order.
        bound_HJB = upper_bounds(q_JHD * geometry.scale, keys)
        bound_KGJB = bound_HJB.reshape(len(keys.low_KBD), -1, *bound_HJB.shape[1:])
        return bound_KGJB.amax(dim=1).float()

    def ranking(self, blocks: QueryBlocks, readable_JB: Tensor) -> Ranking:
        """See `BlockSelection`."""
        blocks_B = torch.arange(readable_JB.shape[1], device=readable_JB.device)
        is_always_JB = (blocks_B < self.sinks) | (blocks_B > blocks.own_J[:, None] - self.local)
        always_JB = readable_JB & (is_always_JB | blocks.is_prompt_J[:, None])
        return Ranking(always_JB, self.tokens // self.block_size - always_JB.sum(dim=1))

    def choose(
        self,
        layer: int,  # noqa: ARG002
        blocks: QueryBlocks,
        readable_JB: Tensor,
        score_GJB: Tensor,
    ) -> Tensor:
        """See `BlockSelection`."""
        return self.ranking(blocks, readable_JB).picked(score_GJB, readable_JB)
