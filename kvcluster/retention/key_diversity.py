"""Retention `key_diversity`: tokens whose keys are unlike the others (KeyDiff, arXiv 2504.15364).

The score of a token is minus the cosine of its key with the mean of all keys of the head among
which survivors are chosen, each brought to length 1. It looks at no query, so it is a function of
the prefix alone. Lengths are brought to 1 in whole numbers of `_UNIT`, so that sums over ranks are
exact.

Shape letters: S tokens, K KV heads, D head dimension.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from torch import Tensor

from kvcluster.retention.base import Budgeted, Need
from kvcluster.retention.candidates import Candidates
from kvcluster.retention.ranks import Ranks
from kvcluster.retention.top_k import PADDING

_UNIT: Final = 2.0**-20
"""A cosine of up to 2^13 dimensions then fits into the 53 bits of a float64."""


@dataclass(frozen=True, kw_only=True)
class KeyDiversity(Budgeted):
    """Keeps what is unlike the rest."""

    name: ClassVar[str] = "key_diversity"
    needs: ClassVar[Need] = Need.KEYS

    def score(
        self,
        candidates: Candidates,
        num_tokens: int,  # noqa: ARG002
        ranks: Ranks,
    ) -> Tensor:
        """See `ScoredRetention`."""
        is_token_KS = candidates.positions_KS != PADDING
        unit_KSD = _unit_lengths(candidates.k_KSD) * is_token_KS[..., None]
        sum_KD = ranks.sum(unit_KSD.sum(dim=1))
        num_tokens_K = ranks.sum(is_token_KS.sum(dim=1))
        mean_KD = sum_KD.div(num_tokens_K[:, None], rounding_mode="floor")
        similarity_KS = (unit_KSD * mean_KD[:, None]).sum(dim=2)
        # Of whole numbers, so that ranks agree. It changes no order within a head.
        length_K1 = mean_KD.square().sum(dim=1, keepdim=True).double().sqrt()
        return -similarity_KS.double() / length_K1.clamp_min(1.0)


def _unit_lengths(k_KSD: Tensor) -> Tensor:
    """Keys of length 1 in units, int64. A key of zeros stays one."""
    k_KSD = k_KSD.double()
    length_KS1 = k_KSD.square().sum(dim=-1, keepdim=True).sqrt()
    scaled_KSD = k_KSD / length_KS1.masked_fill(length_KS1 == 0, 1.0)
    return (scaled_KSD / _UNIT).round().long()
