"""Retention `heavy_hitters`: tokens that got most attention so far (H2O, arXiv 2306.14048).

The score of a token is the sum, over all queries so far that could see it, of their attention
probability for it under the LSE over all ranks' keys, summed over the query heads of the KV head,
divided by the number of those queries. The paper does not divide, and so prefers old tokens.
Sums go on from epoch to epoch for survivors, and end with a token.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcluster.retention.base import Need, SumsOfAllQueries
from kvcluster.retention.candidates import Candidates
from kvcluster.retention.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(SumsOfAllQueries):
    """Keeps what queries look at most, on average over its life."""

    name: ClassVar[str] = "heavy_hitters"
    needs: ClassVar[Need] = Need.QUERIES

    def score(
        self,
        candidates: Candidates,
        num_tokens: int,
        ranks: Ranks,  # noqa: ARG002
    ) -> Tensor:
        """See `ScoredRetention`."""
        # A survivor was seen by every query since its own.
        return candidates.mass_KS.double() / (num_tokens - candidates.positions_KS)
