from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvcluster.engine.sharding import zigzag
from kvcluster.types import Rank


def test_each_rank_gets_an_early_and_a_late_piece() -> None:
    assert zigzag(8, [Rank(0), Rank(1)]) == [0, 0, 1, 1, 1, 1, 0, 0]


def test_few_blocks_go_to_the_first_ranks_given() -> None:
    assert zigzag(1, [Rank(2), Rank(0), Rank(1)]) == [2]
    assert sorted(zigzag(2, [Rank(2), Rank(0), Rank(1)])) == [0, 2]


def test_one_rank_gets_everything() -> None:
    assert zigzag(5, [Rank(0)]) == [0] * 5


@given(num_blocks=st.integers(0, 200), num_ranks=st.integers(1, 9))
def test_blocks_and_causal_work_are_balanced(num_blocks: int, num_ranks: int) -> None:
    ranks = [Rank(rank) for rank in range(num_ranks)]

    owners = zigzag(num_blocks, ranks)

    counts = Counter(owners)
    assert len(owners) == num_blocks
    # One piece may be one block longer than another, and every rank has two pieces.
    assert max(counts.values(), default=0) - min(counts[rank] for rank in ranks) <= 2
    work = [sum(i for i, owner in enumerate(owners) if owner == rank) for rank in ranks]
    if num_blocks % (2 * num_ranks) == 0:
        assert max(work) == min(work)
