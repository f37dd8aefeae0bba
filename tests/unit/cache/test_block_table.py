from kvcluster.cache.block_table import BlockTable, TableEntry
from kvcluster.types import NO_BLOCK, BlockId, Rank


def table(*owners: int) -> BlockTable:
    """Two groups; entry i has blocks i and 100 + i."""
    made = BlockTable(2)
    for entry, rank in enumerate(owners):
        made.add(TableEntry(Rank(rank), (BlockId(entry), BlockId(100 + entry))))
    return made


def test_the_last_block_is_known_per_rank_and_group() -> None:
    made = table(0, 1, 0)

    assert (made.last_id(Rank(0), 0), made.last_id(Rank(0), 1)) == (2, 102)
    assert made.last_id(Rank(1), 1) == 101
    assert made.last_id(Rank(2), 0) is None


def test_removing_entries_of_one_group_leaves_the_others() -> None:
    made = table(0, 1, 0)

    removed = made.remove_below(1, 2)

    assert [held[:3] for held in removed] == [(0, 100, NO_BLOCK), (1, 101, NO_BLOCK)]
    assert made.block_ids == [[0, 1, 2], [NO_BLOCK, NO_BLOCK, 102]]
    assert (made.num_exact(0), made.num_exact(1)) == (3, 1)
    assert len(made) == 3


def test_an_entry_is_removed_once() -> None:
    made = table(0, 0, 0)
    made.remove_below(0, 2)

    assert made.remove_below(0, 1) == []
    assert [held[:3] for held in made.remove_below(0, 3)] == [(0, 2, NO_BLOCK)]
