import pytest

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.cache.partition import Partition
from kvcluster.cache.pool_tier import pool_ledger
from kvcluster.cache.table_entries import entries_per_group
from kvcluster.cache.tier import TierShare
from kvcluster.tenancy.limits import UNLIMITED
from kvcluster.types import NO_BLOCK, Rank, TenantId
from tests.fake_engine import model_spec

RED = TenantId("red")
BLUE = TenantId("blue")


def pools(*sizes: tuple[int, ...]) -> list[list[BlockPool]]:
    """One tuple of pool sizes (one per group) for each rank."""
    return [[BlockPool(size) for size in groups] for groups in sizes]


def red_and_blue(
    shared: list[list[BlockPool]], limit_blocks: int = UNLIMITED
) -> tuple[Partition, Partition]:
    """Red may hold so many blocks."""
    ledger = pool_ledger(shared)
    ledger.apply({RED: TierShare(limit_bytes=limit_blocks)})
    return (
        Partition(shared, tenant=RED, ledger=ledger),
        Partition(shared, tenant=BLUE, ledger=ledger),
    )


def test_an_entry_has_a_block_in_every_group_of_one_rank() -> None:
    partition = Partition(pools((4, 2), (4, 2)), tenant=RED)
    table = BlockTable(2)

    entry = partition.append(table, Rank(1))

    assert entry is not None
    assert entry.rank == 1
    assert len(entry.block_ids) == 2
    assert [rank.num_free for rank in partition.statistics().ranks] == [6, 4]


def test_an_entry_that_one_group_cannot_take_takes_nothing_from_the_others() -> None:
    partition = Partition(pools((4, 1)), tenant=RED)
    table = BlockTable(2)
    partition.append(table, Rank(0))

    assert partition.append(table, Rank(0)) is None
    assert len(table) == 1
    assert partition.free_per_group() == (3, 0)


def test_a_tenant_gets_no_more_than_its_limit_though_blocks_are_free() -> None:
    shared = pools((4,), (4,))
    red, _ = red_and_blue(shared, 3)
    table = BlockTable(1)
    for rank in (0, 1, 0):
        assert red.append(table, Rank(rank)) is not None

    assert red.append(table, Rank(1)) is None
    assert not red.can_append(table, Rank(1))
    assert red.capacity() == (3,)


def test_two_partitions_of_the_same_pools_never_share_a_block() -> None:
    shared = pools((4,))
    red, blue = red_and_blue(shared)
    red_table, blue_table = BlockTable(1), BlockTable(1)
    for _ in range(2):
        red.append(red_table, Rank(0))
        blue.append(blue_table, Rank(0))

    assert not set(red_table.block_ids[0]) & set(blue_table.block_ids[0])
    assert (red.num_used, blue.num_used) == (2, 2)


def test_what_is_counted_beside_the_blocks_is_part_of_the_share() -> None:
    shared = pools((4,), (4,))
    red, blue = red_and_blue(shared, 5)
    table = BlockTable(1)
    red.append(table, Rank(0))

    assert red.count_beside(table, 0, 3)
    assert not red.count_beside(table, 0, 5)
    assert (red.num_used, red.free_per_group()) == (4, (1,))
    assert red.count_beside(table, 0, 1)
    assert (red.num_used, red.free_per_group()) == (2, (3,))
    # It takes no block of any pool.
    assert blue.free_per_group() == (7,)
    red.release_all(table)
    assert (red.num_used, red.free_per_group()) == (0, (5,))


def test_without_a_limit_what_is_beside_counts_against_all_blocks() -> None:
    partition = Partition(pools((2,), (2,)), tenant=RED)
    table = BlockTable(1)

    assert partition.count_beside(table, 0, 3)
    assert partition.append(table, Rank(0)) is not None
    assert partition.append(table, Rank(1)) is None
    assert not partition.can_append(table, Rank(1))


def test_releasing_everything_frees_what_is_left_of_every_group() -> None:
    partition = Partition(pools((4, 4)), tenant=RED)
    table = BlockTable(2)
    for _ in range(4):
        partition.append(table, Rank(0))
    partition.release_below(table, 1, 3)

    assert partition.num_used == 5
    partition.release_all(table)
    assert partition.num_used == 0
    assert partition.free_per_group() == (4, 4)


def test_blocks_of_one_sequence_on_one_rank_are_consecutive() -> None:
    partition = Partition(pools((8,), (8,)), tenant=RED)
    table = BlockTable(1)
    for rank in (0, 1, 1, 0, 0, 1):
        partition.append(table, Rank(rank))

    assert table.block_ids[0] == [0, 0, 1, 1, 2, 2]


def test_room_is_what_is_free_now_and_capacity_what_could_ever_be() -> None:
    partition = Partition(pools((4, 2), (4, 2)), tenant=RED)
    table = BlockTable(2)
    partition.append(table, Rank(0))

    assert partition.has_room((7, 3))
    assert not partition.has_room((7, 4))
    assert partition.capacity() == (8, 4)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, (1, 1)), (8, (2, 2)), (100, (25, 5)), (10_000, (2500, 5))]
)
def test_a_windowed_group_needs_entries_for_window_and_chunk_only(
    num_tokens: int, expected: tuple[int, int]
) -> None:
    assert entries_per_group((None, 8), num_tokens, block_size=4, chunk_tokens=8) == expected


def test_block_bytes_count_every_layer_of_the_group() -> None:
    spec = model_spec(windows=(None, 8, 8))
    per_layer = 16 * 4 * (4 + 4)

    assert block_bytes_per_group(spec, 16) == (per_layer, 2 * per_layer)
    assert sum(block_bytes_per_group(spec, 16)) == 16 * spec.kv_bytes_per_token


def test_a_sequence_that_keeps_what_is_latest_needs_no_more_entries() -> None:
    needed = [
        entries_per_group((None, 8), num_tokens, block_size=4, chunk_tokens=8, recent_blocks=3)
        for num_tokens in (12, 100, 10_000)
    ]

    # The first, the 3 latest, 2 of the chunk and the one that the chunk begins in.
    assert needed == [(3, 3), (7, 5), (7, 5)]


def test_the_first_entry_can_be_held_on_to() -> None:
    partition = Partition(pools((4,)), tenant=RED)
    table = BlockTable(1)
    for _ in range(4):
        partition.append(table, Rank(0))

    partition.release_below(table, 0, 3, after=1)

    assert [block_id != NO_BLOCK for block_id in table.block_ids[0]] == [True, False, False, True]
    assert partition.num_used == 2
    partition.release_all(table)
    assert partition.num_used == 0
