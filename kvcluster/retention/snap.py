"""Retention `snap`: tokens that the latest queries attend to (SnapKV, arXiv 2404.14469).

The score of a token is what the last `queries` queries of the epoch give it, as in
`heavy_hitters`, then the largest score among its `POOLED` nearest tokens, its own included. Near is
counted in tokens that are still there, by order of position, whatever lies dropped between them.
Nothing is carried over from one epoch to the next. The paper scores once, with the end of a
prompt; here every epoch is scored with its own end.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvcluster.retention.base import Need, SumsOfLastQueries
from kvcluster.retention.candidates import Candidates
from kvcluster.retention.ranks import Ranks

POOLED: Final = 7
"""Tokens over which a score spreads: a fact is worded in neighbouring tokens."""


@dataclass(frozen=True, kw_only=True)
class Snap(SumsOfLastQueries):
    """Keeps what is being looked at, and what stands around it."""

    name: ClassVar[str] = "snap"
    needs: ClassVar[Need] = Need.QUERIES

    def score(
        self,
        candidates: Candidates,
        num_tokens: int,  # noqa: ARG002
        ranks: Ranks,
    ) -> Tensor:
        """See `ScoredRetention`."""
        return _pooled(candidates.mass_KS.double(), candidates.positions_KS, ranks)


def _pooled(scores_KS: Tensor, positions_KS: Tensor, ranks: Ranks) -> Tensor:
    """The largest score around each token. Neighbours may be on other ranks."""
    all_positions_KS = torch.cat(ranks.gather(positions_KS), dim=1)
    all_scores_KS = torch.cat(ranks.gather(scores_KS), dim=1)
    # Padding comes first; its score is 0, and none is less.
    ordered_KS, order_KS = all_positions_KS.sort(dim=1)
    pooled_KS = max_pool1d(all_scores_KS.gather(1, order_KS), POOLED, stride=1, padding=POOLED // 2)
    places_KS = torch.searchsorted(ordered_KS, positions_KS.contiguous())
    return pooled_KS.gather(1, places_KS)
