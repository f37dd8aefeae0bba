"""How survivors are chosen by score: the protocol of a method, and what all methods share.

A rank gives the tokens that it holds. Scores are the same for any number of ranks: each is a
function of sums of whole numbers, which no order changes, and of the LSE over all ranks' keys, in
float64. Among the tokens of all ranks the best are then chosen exactly.

The mass that queries give to tokens is such a sum, so an epoch's queries may be observed a few at a
time, as they come, and none of them has to be kept.

Shape letters: S tokens that may survive, K KV heads.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvcluster.retention.attention_mass import attention_mass
from kvcluster.retention.base import Counts, Heads, RetentionPolicy
from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.ranks import ALONE, Ranks
from kvcluster.retention.top_k import top_k_global, top_k_sharded


class Survivors(NamedTuple):
    """Which of this rank's candidates stay."""

    kept_KS: Tensor
    mass_KS: Tensor
    """Of all candidates, as the next epoch begins with it."""


class ScoredRetention(RetentionPolicy, Protocol):
    """A method that scores tokens. `Budgeted` gives it everything but `score`."""

    @property
    def block_size(self) -> int: ...

    @property
    def epoch_tokens(self) -> int: ...

    @property
    def heads(self) -> Heads: ...

    @property
    def carries_mass(self) -> bool:
        """Whether mass goes on from epoch to epoch; otherwise each epoch begins at zero."""
        ...

    def first_observed(self, epoch_start: int) -> int:
        """Queries from this position to the end of their epoch give mass; the epoch's end where
        none do."""
        ...

    def counts(self, num_tokens: int) -> Counts:
        """What stays when an epoch ends after `num_tokens` tokens."""
        ...

    def score(self, candidates: Candidates, num_tokens: int, ranks: Ranks) -> Tensor:
        """scores_KS, float64, of this rank's candidates as an epoch ends after `num_tokens`
        tokens; the highest survive. Anything where there is no token.

        Depends on positions, keys and mass, never on the order of the candidates or on which rank
        holds them. The mass is what all observed queries gave.
        """
        ...


MassOf = Callable[[Candidates, Queries, Ranks], Tensor]
"""`attention_mass`, or what stands for it."""


def observe(
    method: ScoredRetention,
    candidates: Candidates,
    queries: Queries,
    ranks: Ranks = ALONE,
    mass_of: MassOf = attention_mass,
) -> Tensor:
    """mass_KS of this rank's candidates after these queries of one epoch. All tokens that they may
    see must be among the candidates of some rank."""
    epoch_start = queries.first // method.epoch_tokens * method.epoch_tokens
    observed = queries.since(method.first_observed(epoch_start))
    if not len(observed.q_THD):
        return candidates.mass_KS
    return candidates.mass_KS + mass_of(candidates, observed, ranks)


def choose(
    method: ScoredRetention, candidates: Candidates, num_tokens: int, ranks: Ranks = ALONE
) -> Tensor:
    """kept_KS: this rank's survivors as an epoch ends after `num_tokens` tokens.

    Over all ranks each head keeps `method.counts(num_tokens).kept` tokens: the first block, the
    latest ones, and of the others those with the highest score, lower positions first. Shared
    heads keep the same ones: a token's score is then the sum over the heads.
    """
    counts = method.counts(num_tokens)
    scores_KS = method.score(candidates, num_tokens, ranks)
    if method.heads is Heads.SHARED:
        # One by one: how torch orders a sum depends on the shape, and ranks must agree.
        scores_KS = reduce(torch.add, scores_KS.unbind()).expand_as(scores_KS)
    is_pinned_KS = candidates.positions_KS < method.block_size
    is_pinned_KS |= candidates.positions_KS >= num_tokens - counts.recent
    scores_KS = scores_KS.masked_fill(is_pinned_KS, math.inf)
    if ranks is ALONE:
        return top_k_global(scores_KS, candidates.positions_KS, counts.kept)
    return top_k_sharded(scores_KS, candidates.positions_KS, counts.kept, ranks)


def survivors(
    method: ScoredRetention,
    candidates: Candidates,
    readers: Sequence[Queries],
    num_tokens: int,
    ranks: Ranks = ALONE,
) -> Survivors:
    """Observe all queries of an epoch and choose this rank's survivors as it ends. Changes nothing.

    `candidates.mass_KS` is what the epoch began with. `readers`: the queries of each layer that
    reads these keys; what they give adds up.
    """
    if not method.carries_mass:
        candidates = candidates._replace(mass_KS=torch.zeros_like(candidates.mass_KS))
    ended = candidates
    for queries in readers:
        ended = ended._replace(mass_KS=observe(method, ended, queries, ranks))
    kept_KS = choose(method, ended, num_tokens, ranks)
    return Survivors(kept_KS, ended.mass_KS if method.carries_mass else candidates.mass_KS)
