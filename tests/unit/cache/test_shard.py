"""The ranks' map of a sequence agrees with a plain list of who holds each position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.cache.shard import SequenceMap

BLOCK_SIZE = 4
NUM_RANKS = 3


def as_list(runs: list[slice]) -> list[int]:
    return [slot for run in runs for slot in range(run.start, run.stop)]


@given(
    entries=st.lists(st.tuples(st.integers(0, NUM_RANKS - 1), st.integers(0, 9)), max_size=12),
    span=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_slots_positions_and_counts_follow_the_table(
    entries: list[tuple[int, int]], span: tuple[int, int]
) -> None:
    table = SequenceMap(block_size=BLOCK_SIZE, num_ranks=NUM_RANKS, num_groups=2)
    for rank, block_id in entries:
        table.append(rank, (block_id, block_id + 100))
    start, end = (min(bound, table.capacity_tokens) for bound in span)
    positions = range(start, end)

    for rank in range(NUM_RANKS):
        held = [p for p in positions if entries[p // BLOCK_SIZE][0] == rank]
        assert table.num_tokens(rank, start, end) == len(held)
        assert table.positions(rank, start, end).tolist() == held
        for group, shift in enumerate((0, 100)):
            assert as_list(table.runs(rank, group, start, end)) == [
                (entries[p // BLOCK_SIZE][1] + shift) * BLOCK_SIZE + p % BLOCK_SIZE for p in held
            ]


def test_pieces_end_where_the_owner_changes() -> None:
    table = SequenceMap(block_size=BLOCK_SIZE, num_ranks=2, num_groups=1)
    for rank in (0, 0, 1, 0):
        table.append(rank, (0,))

    assert table.pieces(2, 15) == [(0, 2, 8), (1, 8, 12), (0, 12, 15)]


def test_consecutive_blocks_are_one_run_and_need_no_copy() -> None:
    table = SequenceMap(block_size=BLOCK_SIZE, num_ranks=2, num_groups=1)
    for rank, block_id in ((0, 5), (1, 0), (0, 6), (0, 7)):
        table.append(rank, (block_id,))

    assert table.runs(0, 0, 1, 15) == [slice(21, 31)]


def test_a_run_ends_where_block_ids_jump() -> None:
    table = SequenceMap(block_size=BLOCK_SIZE, num_ranks=1, num_groups=1)
    for block_id in (5, 2, 3):
        table.append(0, (block_id,))

    assert table.runs(0, 0, 2, 10) == [slice(22, 24), slice(8, 14)]


def test_reading_a_released_block_is_caught() -> None:
    table = SequenceMap(block_size=BLOCK_SIZE, num_ranks=1, num_groups=2)
    for block_id in range(3):
        table.append(0, (block_id, block_id))

    table.release(1, range(2))

    assert as_list(table.runs(0, 0, 0, 12)) == list(range(12))
    assert as_list(table.runs(0, 1, 8, 12)) == list(range(8, 12))
    with pytest.raises(AssertionError, match="released"):
        table.runs(0, 1, 4, 12)
