"""Each scored method keeps what its definition, token by token, keeps; on any number of ranks."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.retention.attention_mass import UNIT, attention_mass
from kvcluster.retention.base import Heads, Need
from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.heavy_hitters import HeavyHitters
from kvcluster.retention.key_diversity import KeyDiversity
from kvcluster.retention.offered import SCORED
from kvcluster.retention.ranks import ALONE
from kvcluster.retention.scored import ScoredRetention, choose, observe, survivors
from kvcluster.retention.snap import Snap
from kvcluster.types import LayerGeometry
from tests.thread_ring import run_ranks
from tests.unit.retention.definitions import expected, mass
from tests.unit.retention.layers import (
    ThreadRanks,
    geometry,
    random_candidates,
    random_queries,
    shards,
)

SIZES: dict[str, Any] = {"block_size": 4, "epoch_tokens": 16}
NUM_TOKENS = 48
"""Three epochs have passed; 40 candidates are left."""
METHODS: list[ScoredRetention] = [
    HeavyHitters(budget=0.5, **SIZES),
    HeavyHitters(budget=0.3, recent=0, **SIZES),
    Snap(budget=0.5, queries=5, **SIZES),
    Snap(budget=0.4, recent=0.9, queries=16, **SIZES),
    KeyDiversity(budget=0.5, **SIZES),
    KeyDiversity(budget=0.25, recent=0.2, **SIZES),
    HeavyHitters(budget=0.4, heads=Heads.SHARED, **SIZES),
    Snap(budget=0.4, queries=7, heads=Heads.SHARED, **SIZES),
    KeyDiversity(budget=0.5, heads=Heads.SHARED, **SIZES),
]
IDS = [f"{method.name}-{number}" for number, method in enumerate(METHODS)]


def test_every_method_is_tested() -> None:
    assert {method.name for method in METHODS} == {method.name for method in SCORED}


def case(
    seed: int, layer: LayerGeometry | None = None, heads: Heads = Heads.OWN
) -> tuple[Candidates, Queries]:
    layer = layer or geometry()
    # The epoch is whole; of what was before, some tokens are missing.
    candidates = random_candidates(layer, NUM_TOKENS - 16, 24, seed, heads=heads)
    generator = torch.Generator().manual_seed(seed + 1)
    own_KS = torch.arange(NUM_TOKENS - 16, NUM_TOKENS).expand(layer.num_kv_heads, -1)
    k_KSD = torch.randn(*own_KS.shape, layer.key_dim, generator=generator)
    candidates = Candidates(
        torch.cat((candidates.positions_KS, own_KS), dim=1),
        torch.cat((candidates.k_KSD, k_KSD), dim=1),
        torch.cat((candidates.mass_KS, torch.zeros_like(own_KS)), dim=1),
    )
    return candidates, random_queries(layer, NUM_TOKENS - 16, NUM_TOKENS, seed + 2)


def positions(candidates: Candidates, kept_KS: Tensor) -> list[set[int]]:
    return [
        set(positions_S[kept_S].tolist())
        for positions_S, kept_S in zip(candidates.positions_KS, kept_KS, strict=True)
    ]


def survive(
    method: ScoredRetention, candidates: Candidates, queries: Queries, num_ranks: int, seed: int
) -> tuple[list[set[int]], dict[tuple[int, int], int]]:
    """Positions that survive by head, over all ranks, and the mass of each."""
    group = ThreadRanks.group(num_ranks)
    dealt = shards(candidates, num_ranks, seed, method.heads)

    def body(rank: int) -> tuple[Candidates, Tensor, Tensor]:
        own, _ = dealt[rank]
        chosen = survivors(method, own, [queries], NUM_TOKENS, group[rank])
        return own, chosen.kept_KS, chosen.mass_KS

    kept: list[set[int]] = [set() for _ in candidates.positions_KS]
    by_token = {}
    for own, kept_KS, mass_KS in run_ranks(num_ranks, body):
        for head, found in enumerate(positions(own, kept_KS)):
            assert kept[head].isdisjoint(found)
            kept[head] |= found
        for head, slot in kept_KS.nonzero().tolist():
            by_token[head, int(own.positions_KS[head, slot])] = int(mass_KS[head, slot])
    return kept, by_token


@pytest.mark.parametrize("method", METHODS, ids=IDS)
@pytest.mark.parametrize("seed", range(5))
def test_a_method_keeps_what_its_definition_keeps(method: ScoredRetention, seed: int) -> None:
    candidates, queries = case(seed, heads=method.heads)

    chosen = survivors(method, candidates, [queries], NUM_TOKENS)

    assert positions(candidates, chosen.kept_KS) == expected(
        method, candidates, queries, NUM_TOKENS
    )


@settings(max_examples=25, deadline=None)
@given(num_ranks=st.integers(1, 4), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_any_number_of_ranks_keeps_the_same_tokens_and_masses(
    method: ScoredRetention, num_ranks: int, seed: int
) -> None:
    candidates, queries = case(seed, heads=method.heads)

    kept, by_token = survive(method, candidates, queries, num_ranks, seed)

    alone = survivors(method, candidates, [queries], NUM_TOKENS)
    assert kept == positions(candidates, alone.kept_KS)
    for (head, position), found in by_token.items():
        slot = candidates.positions_KS[head].tolist().index(position)
        # float64 may fall on another side of a unit's half, once for each query.
        assert abs(found - int(alone.mass_KS[head, slot])) <= 2 * len(queries.q_THD)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_rank_may_hold_no_token(method: ScoredRetention) -> None:
    candidates, queries = case(6, heads=method.heads)
    group = ThreadRanks.group(2)
    empty = Candidates(*(plane[:, :0] for plane in candidates))

    def body(rank: int) -> Tensor:
        own = empty if rank else candidates
        return survivors(method, own, [queries], NUM_TOKENS, group[rank]).kept_KS

    kept_KS, none_KS = run_ranks(2, body)

    assert positions(candidates, kept_KS) == expected(method, candidates, queries, NUM_TOKENS)
    assert none_KS.shape == (2, 0)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_the_order_of_the_candidates_does_not_matter(method: ScoredRetention) -> None:
    candidates, queries = case(3, heads=method.heads)
    order_S = torch.randperm(
        candidates.positions_KS.shape[1], generator=torch.Generator().manual_seed(0)
    )
    shuffled = Candidates(*(plane[:, order_S] for plane in candidates))

    chosen = survivors(method, shuffled, [queries], NUM_TOKENS)

    assert positions(shuffled, chosen.kept_KS) == expected(method, candidates, queries, NUM_TOKENS)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_method_says_what_it_needs(method: ScoredRetention) -> None:
    candidates, queries = case(1, heads=method.heads)

    mass_KS = observe(method, candidates, queries)

    assert torch.equal(mass_KS, candidates.mass_KS) == (method.needs is Need.KEYS)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 15)), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_queries_may_be_observed_as_they_come(
    method: ScoredRetention, cuts: set[int], seed: int
) -> None:
    candidates, queries = case(seed, heads=method.heads)
    if not method.carries_mass:
        candidates = candidates._replace(mass_KS=torch.zeros_like(candidates.mass_KS))
    seen = candidates
    for first, last in pairwise([0, *sorted(cuts), len(queries.q_THD)]):
        few = queries._replace(q_THD=queries.q_THD[first:last], first=queries.first + first)
        seen = seen._replace(mass_KS=observe(method, seen, few))

    kept_KS = choose(method, seen, NUM_TOKENS)

    assert torch.equal(kept_KS, survivors(method, candidates, [queries], NUM_TOKENS).kept_KS)


def test_softcaps_and_learned_sinks_count_in_the_mass() -> None:
    layer = geometry(softcap=1.5)
    candidates, queries = case(2, layer)
    queries = queries._replace(sinks_H=torch.tensor([0.5, -1.0, 2.0, 0.0]))

    mass_KS = attention_mass(candidates, queries, ALONE)

    for kv_head, masses in enumerate(mass_KS.tolist()):
        wanted = mass(candidates, queries, kv_head)
        found = dict(zip(candidates.positions_KS[kv_head].tolist(), masses, strict=True))
        for position, share in wanted.items():
            # Half a unit for each of 2 heads of 16 queries.
            assert abs(found[position] * UNIT - share) <= 32 * UNIT


def test_the_tiles_do_not_change_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, queries = case(4)
    whole_KS = attention_mass(candidates, queries, ALONE)

    monkeypatch.setattr("kvcluster.retention.attention_mass._TILE_ELEMENTS", 1)

    # A product of one row may round in another order: one unit for each of 2 heads of 16 queries.
    assert int((attention_mass(candidates, queries, ALONE) - whole_KS).abs().max()) <= 32


def test_equal_tokens_survive_by_position() -> None:
    layer = geometry()
    num = 24
    candidates = Candidates(
        torch.arange(num).expand(2, -1),
        torch.ones(2, num, 8),
        torch.zeros(2, num, dtype=torch.int64),
    )
    method = KeyDiversity(budget=0.5, recent=0.25, block_size=4, epoch_tokens=8)

    chosen = survivors(method, candidates, [random_queries(layer, 16, 24, 0)], num)

    assert positions(candidates, chosen.kept_KS) == [{*range(9), 21, 22, 23}] * 2
