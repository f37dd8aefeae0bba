"""What is looked at when survivors are chosen: tokens of one layer, and queries over them.

Shape letters: T query tokens, S tokens that may survive, H query heads, K KV heads, D head
dimension.
"""

from typing import NamedTuple

from torch import Tensor

from kvcluster.types import LayerGeometry


class Candidates(NamedTuple):
    """Tokens of one layer among which survivors are chosen: earlier survivors and the epoch."""

    positions_KS: Tensor
    """int64; each head has tokens of its own, in any order. `top_k.PADDING`: no token here."""
    k_KSD: Tensor
    """As queries read them, rotary position included."""
    mass_KS: Tensor
    """int64: attention received so far, in units of `attention_mass.UNIT`."""


class Queries(NamedTuple):
    """Consecutive queries of the open epoch, all of them on every rank."""

    q_THD: Tensor
    first: int
    """Position of the first one; the others follow."""
    layer: LayerGeometry
    sinks_H: Tensor | None = None
    """Learned logits in the softmax's denominator, where the model has them."""

    @property
    def last(self) -> int:
        """Position after the last one."""
        return self.first + len(self.q_THD)

    def since(self, position: int) -> "Queries":
        """Those at this position and after it."""
        num_skipped = max(0, position - self.first)
        return self._replace(q_THD=self.q_THD[num_skipped:], first=self.first + num_skipped)
