"""How survivors are chosen by score: the protocol of a method, and what all methods share.

A rank gives the tokens that it holds. Scores are the same for any number of ranks: each is a
function of sums of whole numbers, which no order changes, and of the LSE over all ranks' keys, in
float64. Among the tokens of all ranks the best are then chosen exactly.

Shape letters: T query tokens, S tokens that may survive, H query heads, K KV heads, D head
dimension.
"""

import math
from typing import NamedTuple, Protocol

from torch import Tensor

from kvcluster.retention.base import Counts, RetentionPolicy
from kvcluster.retention.ranks import ALONE, Ranks
from kvcluster.retention.top_k import top_k_global, top_k_sharded
from kvcluster.types import LayerGeometry


class Candidates(NamedTuple):
    """Tokens of one layer among which survivors are chosen: earlier survivors and the epoch."""

    positions_KS: Tensor
    """int64; each head has tokens of its own, in any order. `top_k.PADDING`: no token here."""
    k_KSD: Tensor
    """As queries read them, rotary position included."""
    mass_KS: Tensor
    """int64: attention received up to the last epoch's end, in units of `attention_mass.UNIT`."""


class Queries(NamedTuple):
    """The queries of the epoch that ends, all of them on every rank."""

    q_THD: Tensor
    first: int
    """Position of the first one; the others follow."""
    layer: LayerGeometry
    sinks_H: Tensor | None = None
    """Learned logits in the softmax's denominator, where the model has them."""


class Scored(NamedTuple):
    """What a method makes of its candidates."""

    scores_KS: Tensor
    """float64; the highest survive. Anything where there is no token."""
    mass_KS: Tensor
    """`Candidates.mass_KS` for the next epoch's end."""


class Survivors(NamedTuple):
    """Which of this rank's candidates stay."""

    kept_KS: Tensor
    mass_KS: Tensor
    """Of all candidates."""


class ScoredRetention(RetentionPolicy, Protocol):
    """A method that scores tokens. `Budgeted` gives it everything but `score`."""

    @property
    def block_size(self) -> int: ...

    @property
    def epoch_tokens(self) -> int: ...

    def counts(self, num_tokens: int) -> Counts:
        """What stays when an epoch ends after `num_tokens` tokens."""
        ...

    def score(
        self, candidates: Candidates, queries: Queries | None, num_tokens: int, ranks: Ranks
    ) -> Scored:
        """Score this rank's candidates as an epoch ends after `num_tokens` tokens.

        Depends on positions, keys, mass and queries, never on the order of the candidates or on
        which rank holds them. `queries` are there if the method's `needs` are queries.
        """
        ...


def survivors(
    method: ScoredRetention,
    candidates: Candidates,
    queries: Queries | None,
    num_tokens: int,
    ranks: Ranks = ALONE,
) -> Survivors:
    """Choose this rank's survivors as an epoch ends after `num_tokens` tokens. Changes nothing.

    Over all ranks each head keeps `method.counts(num_tokens).kept` tokens: the first block, the
    latest ones, and of the others those with the highest score, lower positions first.
    """
    counts = method.counts(num_tokens)
    scored = method.score(candidates, queries, num_tokens, ranks)
    is_pinned_KS = candidates.positions_KS < method.block_size
    is_pinned_KS |= candidates.positions_KS >= num_tokens - counts.recent
    scores_KS = scored.scores_KS.masked_fill(is_pinned_KS, math.inf)
    if ranks is ALONE:
        kept_KS = top_k_global(scores_KS, candidates.positions_KS, counts.kept)
    else:
        kept_KS = top_k_sharded(scores_KS, candidates.positions_KS, counts.kept, ranks)
    return Survivors(kept_KS, scored.mass_KS)
