"""Selection `quest`: each query reads the blocks that could hold its largest logits, in decode
(Quest, arXiv 2406.10774).

A block is known by the least and the largest number of its keys in each dimension. No key of it can
have a larger product with a query than the sum, over dimensions, of the larger of the two products.
A KV head reads what its query heads want together: a block's score is the largest bound of any of
them, so a kernel reads shared blocks once.

Shape letters: T query tokens, B blocks, H query heads, K KV heads.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcluster.selection.base import KeySummaries, Rows, pick_best, upper_bounds
from kvcluster.types import LayerGeometry


@dataclass(frozen=True, kw_only=True)
class Quest:
    """Reads the query's own block and the best of the others."""

    name: ClassVar[str] = "quest"

    tokens: int
    """What a query reads: whole blocks, its own included."""
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.tokens < self.block_size or self.tokens % self.block_size:
            raise ValueError(
                "tokens must be a multiple of the block size and at least one block: give "
                f"{self.block_size} or a multiple of it, not {self.tokens}"
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
        bound_HTB = upper_bounds(rows.q_THD * geometry.scale, keys)
        num_rows, num_blocks = rows.readable_TB.shape
        score_KTB = bound_HTB.reshape(len(keys.low_KBD), -1, num_rows, num_blocks).amax(dim=1)
        is_own_TB = rows.own_T.new_ones(num_blocks).cumsum(0) - 1 == rows.own_T[:, None]
        num_T = rows.own_T.new_full((num_rows,), self.tokens // self.block_size - 1)
        return pick_best(score_KTB, rows.readable_TB & ~is_own_TB, num_T) | is_own_TB
