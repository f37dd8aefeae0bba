"""The best tokens of all ranks are chosen exactly, ties by position."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcluster.retention.ranks import ALONE
from kvcluster.retention.top_k import PADDING, top_k_global, top_k_sharded
from tests.thread_ring import run_ranks
from tests.unit.retention.layers import ThreadRanks

# Few values, so that ties are the rule; both zeros are one number.
SCORES = st.sampled_from([-math.inf, -2.5, -1e-300, -0.0, 0.0, 5e-324, 1.0, 1.0 + 2**-52, math.inf])


@st.composite
def dealt_tokens(draw: st.DrawFn) -> tuple[list[tuple[float, int, int]], int, int]:
    """(score, position, rank) of tokens, how many to choose, and the number of ranks."""
    num_ranks = draw(st.integers(1, 4))
    positions = draw(st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=24, unique=True))
    tokens = [
        (draw(SCORES), position, draw(st.integers(0, num_ranks - 1))) for position in positions
    ]
    return tokens, draw(st.integers(1, len(tokens))), num_ranks


def best(tokens: list[tuple[float, int, int]], k: int) -> set[int]:
    """The definition, in Python: the positions of the best."""
    ordered = sorted(tokens, key=lambda token: (-token[0], token[1]))
    return {position for _, position, _ in ordered[:k]}


@given(case=dealt_tokens())
def test_the_definition_takes_the_highest_scores_and_then_the_lowest_positions(
    case: tuple[list[tuple[float, int, int]], int, int],
) -> None:
    tokens, k, _ = case
    # Padding scores as high as anything, and must not be chosen.
    positions_KS = torch.tensor([[PADDING, *(token[1] for token in tokens), PADDING]])
    scores_KS = torch.tensor(
        [[math.inf, *(token[0] for token in tokens), 0.0]], dtype=torch.float64
    )

    kept_KS = top_k_global(scores_KS, positions_KS, k)

    assert set(positions_KS[kept_KS].tolist()) == best(tokens, k)
    assert int(kept_KS.sum()) == k


@settings(max_examples=60, deadline=None)
@given(case=dealt_tokens())
def test_shards_keep_together_what_the_definition_keeps(
    case: tuple[list[tuple[float, int, int]], int, int],
) -> None:
    tokens, k, num_ranks = case
    group = ThreadRanks.group(num_ranks)

    def body(rank: int) -> set[int]:
        own = [token for token in tokens if token[2] == rank]
        positions_KS = torch.tensor([[PADDING, *(token[1] for token in own)]])
        scores_KS = torch.tensor([[math.inf, *(token[0] for token in own)]], dtype=torch.float64)
        kept_KS = top_k_sharded(scores_KS, positions_KS, k, group[rank])
        return set(positions_KS[kept_KS].tolist())

    kept = run_ranks(num_ranks, body)

    assert set().union(*kept) == best(tokens, k)
    assert sum(map(len, kept)) == k


def test_each_head_has_a_threshold_of_its_own() -> None:
    scores_KS = torch.tensor([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0]], dtype=torch.float64)
    positions_KS = torch.tensor([[0, 1, 2], [0, 5, 7]])

    kept_KS = top_k_sharded(scores_KS, positions_KS, 2, ALONE)

    assert kept_KS.tolist() == [[False, True, True], [True, True, False]]


@pytest.mark.parametrize("k", [0, 3])
def test_choosing_more_tokens_than_a_head_has_is_refused(k: int) -> None:
    scores_KS = torch.zeros(2, 3, dtype=torch.float64)
    positions_KS = torch.tensor([[0, 1, 2], [0, 1, PADDING]])

    for refusing in (
        lambda: top_k_global(scores_KS, positions_KS, k),
        lambda: top_k_sharded(scores_KS, positions_KS, k, ALONE),
    ):
        with pytest.raises(ValueError, match=f"cannot choose {k}"):
            refusing()
