"""Retention `heavy_hitters`: tokens that got most attention so far (H2O, arXiv 2306.14048).

The score of a token is the sum, over all queries so far that could see it, of their attention
probability for it under the LSE over all ranks' keys, summed over the query heads of the KV head,
divided by the number of those queries. The paper does not divide, and so prefers old tokens.
Sums go on from epoch to epoch for survivors, and end with a token.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvcluster.retention.attention_mass import attention_mass
from kvcluster.retention.base import Budgeted, Need
from kvcluster.retention.ranks import Ranks
from kvcluster.retention.scored import Candidates, Queries, Scored


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(Budgeted):
    """Keeps what queries look at most, on average over its life."""

    name: ClassVar[str] = "heavy_hitters"
    needs: ClassVar[Need] = Need.QUERIES

    def score(
        self, candidates: Candidates, queries: Queries | None, num_tokens: int, ranks: Ranks
    ) -> Scored:
        """See `ScoredRetention`."""
        assert queries is not None, "the method's needs are queries"
        mass_KS = candidates.mass_KS + attention_mass(candidates, queries, ranks)
        # A survivor was seen by every query since its own.
        num_seeing_KS = num_tokens - candidates.positions_KS
        return Scored(mass_KS.double() / num_seeing_KS, mass_KS)
