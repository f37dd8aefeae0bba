import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.partition import Partition
from kvcluster.types import DEFAULT_TENANT, PAGE_BLOCKS, BlockId, Rank


def take(pool: BlockPool, after: int | None = None) -> int:
    block_id = pool.allocate(None if after is None else BlockId(after))
    assert block_id is not None
    return block_id


def take_run(pool: BlockPool, length: int) -> list[int]:
    run = [take(pool)]
    while len(run) < length:
        run.append(take(pool, after=run[-1]))
    return run


def test_a_sequence_alone_gets_consecutive_blocks_from_the_start() -> None:
    assert take_run(BlockPool(8), 8) == list(range(8))


def test_a_second_sequence_starts_in_the_middle_of_what_is_free() -> None:
    pool = BlockPool(16)
    first = take_run(pool, 4)

    second = take(pool)

    assert second == 10
    assert take(pool, after=first[-1]) == 4


def test_two_growing_sequences_both_stay_consecutive() -> None:
    pool = BlockPool(64)
    first, second = [take(pool)], [take(pool)]
    for _ in range(20):
        first.append(take(pool, after=first[-1]))
        second.append(take(pool, after=second[-1]))

    assert first == list(range(first[0], first[0] + 21))
    assert second == list(range(second[0], second[0] + 21))


def test_a_sequence_whose_successor_is_taken_goes_on_in_the_largest_free_run() -> None:
    pool = BlockPool(10)
    run = take_run(pool, 10)
    for block_id in (2, 5, 6, 7):
        pool.release(BlockId(run[block_id]))

    assert take(pool, after=3) == 6


def test_an_empty_pool_gives_nothing() -> None:
    pool = BlockPool(1)
    take(pool)

    assert pool.allocate(None) is None
    assert pool.num_free == 0


def test_a_block_is_free_only_when_its_last_user_leaves() -> None:
    pool = BlockPool(2)
    block_id = BlockId(take(pool))
    pool.retain(block_id)

    pool.release(block_id)
    assert pool.ref_count(block_id) == 1
    assert pool.num_free == 1
    pool.release(block_id)
    assert pool.num_free == 2


def test_releasing_or_retaining_a_free_block_is_an_error() -> None:
    pool = BlockPool(2)

    with pytest.raises(ValueError, match="free"):
        pool.release(BlockId(0))
    with pytest.raises(ValueError, match="free"):
        pool.retain(BlockId(0))


def test_statistics_tell_how_scattered_the_free_blocks_are() -> None:
    pool = BlockPool(6)
    run = take_run(pool, 6)
    for block_id in (run[0], run[1], run[4]):
        pool.release(BlockId(block_id))

    statistics = pool.statistics()

    assert (statistics.num_blocks, statistics.num_free) == (6, 3)
    assert (statistics.num_free_runs, statistics.largest_free_run) == (2, 2)


@given(
    num_blocks=st.integers(0, 20),
    actions=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=120),
)
def test_every_block_has_one_user_and_free_runs_are_whole(
    num_blocks: int, actions: list[tuple[bool, int]]
) -> None:
    pool = BlockPool(num_blocks)
    used: list[int] = []
    for is_allocation, number in actions:
        if is_allocation:
            after = used[number % len(used)] if used and number % 3 else None
            block_id = pool.allocate(None if after is None else BlockId(after))
            assert (block_id is None) == (len(used) == num_blocks)
            if block_id is not None:
                assert block_id not in used
                assert 0 <= block_id < num_blocks
                if after is not None and after + 1 < num_blocks and after + 1 not in used:
                    assert block_id == after + 1
                used.append(block_id)
        elif used:
            pool.release(BlockId(used.pop(number % len(used))))

    free = [block_id for block_id in range(num_blocks) if block_id not in used]
    starts = [block_id for block_id in free if block_id - 1 not in free]
    assert pool.num_free == len(free)
    assert pool.statistics().num_free_runs == len(starts)
    assert [pool.ref_count(BlockId(block_id)) for block_id in range(num_blocks)] == [
        int(block_id in used) for block_id in range(num_blocks)
    ]


def test_blocks_that_come_and_go_stay_at_the_low_end() -> None:
    pool = BlockPool(64)
    held = [pool.allocate_lowest() for _ in range(4)]

    for _ in range(50):
        released = held.pop(0)
        assert released is not None
        pool.release(released)
        held.append(pool.allocate_lowest())

    assert max(block for block in held if block is not None) < 4
    assert [BlockPool(1).allocate_lowest(), BlockPool(0).allocate_lowest()] == [0, None]


def test_a_long_sequence_with_a_codec_touches_few_exact_blocks() -> None:
    pool = BlockPool(80)
    partition = Partition(
        [[pool]], tenant=DEFAULT_TENANT, encoded_per_page=lambda _codec: (60,), exact_recent=1
    )
    table = BlockTable(1, "int4")
    touched: set[int] = set()
    for entry in range(100):
        taken = partition.append(table, Rank(0))
        assert taken is not None
        touched.update(taken.block_ids)
        if entry > 1:
            partition.release_exact(table, entry - 1)

    # The first one, the latest two, and the one that a new entry needs beside them.
    assert len(touched) <= 4


def test_a_block_of_a_broken_page_is_taken_where_whole_ones_have_to_stay() -> None:
    pool = BlockPool(4 * PAGE_BLOCKS)
    # In the middle of what is free.
    taken = [pool.allocate(None), pool.allocate(None)]
    assert taken == [0, 16]

    found = [pool.allocate_in_broken_page(None) for _ in range(2 * PAGE_BLOCKS - 2)]

    assert pool.num_free_pages == 2
    assert set(found) == {*range(1, PAGE_BLOCKS), *range(17, 16 + PAGE_BLOCKS)}
    assert pool.allocate_in_broken_page(None) is None


def test_in_a_broken_page_a_sequence_goes_on_where_it_was() -> None:
    pool = BlockPool(4 * PAGE_BLOCKS)
    run = take_run(pool, 3)
    take(pool)

    assert pool.allocate_in_broken_page(BlockId(run[-1])) == run[-1] + 1


@given(steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), max_size=60))
def test_free_pages_are_counted_as_they_lie(steps: list[tuple[int, int]]) -> None:
    pool, held = BlockPool(5 * PAGE_BLOCKS + 3), list[int]()
    for kind, choice in steps:
        found: int | None = None
        if kind == 0:
            found = pool.allocate(None)
        elif kind == 1:
            found = pool.allocate_in_broken_page(None)
        elif kind == 2:
            found = pool.allocate_lowest()
        elif held:
            pool.release(BlockId(held.pop(choice % len(held))))
        held += [] if found is None else [found]
        free = [
            all(
                pool.ref_count(BlockId(page * PAGE_BLOCKS + slot)) == 0
                for slot in range(PAGE_BLOCKS)
            )
            for page in range(5)
        ]
        assert pool.num_free_pages == sum(free)
