"""How many threads a rank computes with."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ThreadShare:
    """How the ranks of one machine share its cores: those with rows in a step split them."""

    num_cores: int
    ranks: frozenset[int]
    """The ranks on this machine."""
    fixed: int = 0
    """Threads of each rank whatever the others do; 0: share."""

    def threads(self, rank: int, busy_ranks: Sequence[int]) -> int:
        """Threads of a rank in a step. One that only answers queries leaves the cores to those
        that run the model."""
        if rank not in busy_ranks:
            return 1
        num_busy = len(self.ranks.intersection(busy_ranks))
        return self.fixed or max(1, self.num_cores // num_busy)
