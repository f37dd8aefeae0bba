"""Kept blocks: chains of keys, forms by length, holders, and what is given up first."""

from array import array

import pytest

from kvcluster.cache.block_keys import BlockKeys, Scope
from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable, TableEntry
from kvcluster.cache.encoded_pool import EncodedPool
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.held_forms import Form, HeldForms
from kvcluster.cache.partition import Partition
from kvcluster.cache.prefix_cache import PrefixCache
from kvcluster.types import DEFAULT_TENANT, Rank

EXACT_FORMS = HeldForms(windows=(None,), block_size=4)


def named(tokens: list[int]) -> tuple[BlockKeys, "array[int]"]:
    keys = BlockKeys(b"s" * 32, Scope("model", "exact", 4, ""))
    known = array("I", tokens)
    keys.extend(known)
    return keys, known


class Kept:
    """A partition of one rank, and what is kept of sequences that ended."""

    def __init__(self, num_blocks: int = 32) -> None:
        self.partition = Partition([[BlockPool(num_blocks)]], tenant=DEFAULT_TENANT)
        self.cache = PrefixCache(self.partition)

    def keep(self, tokens: list[int]) -> BlockKeys:
        """Of a sequence that has just these tokens, in whole blocks."""
        keys, known = named(tokens)
        table = BlockTable(1)
        for _ in keys.keys:
            assert self.partition.append(table, Rank(0)) is not None
        self.cache.keep(keys.keys, known, table, EXACT_FORMS, len(keys.keys))
        self.partition.release_all(table)
        return keys

    def num_matched(self, tokens: list[int]) -> int:
        keys, known = named(tokens)
        return len(self.cache.match(keys.keys, known))


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_equal_beginnings_are_kept_once(kept: Kept) -> None:
    kept.keep([1] * 16)
    kept.keep([*[1] * 12, 2, 2, 2, 2])

    assert kept.partition.num_used == 5
    assert kept.num_matched([*[1] * 12, 3, 3, 3, 3]) == 3


def test_what_was_used_last_is_given_up_last(kept: Kept) -> None:
    kept.keep([1] * 8)
    kept.keep([2] * 8)
    keys, known = named([1] * 8)
    kept.cache.touch(kept.cache.match(keys.keys, known))
    kept.cache.evict(0, 1)

    assert (kept.num_matched([1] * 8), kept.num_matched([2] * 8)) == (2, 1)


def test_what_somebody_uses_is_not_given_up(kept: Kept) -> None:
    keys = kept.keep([1] * 8)
    _, known = named([1] * 8)
    blocks = kept.cache.match(keys.keys, known)
    table = BlockTable(1)
    for entry in kept.cache.usable(blocks, EXACT_FORMS, 2):
        assert kept.cache.shared.adopt(table, entry) is not None

    assert kept.cache.idle_units() == (0,)
    kept.cache.evict(0, 2)
    assert kept.num_matched([1] * 8) == 2
    kept.partition.release_all(table)
    assert kept.cache.idle_units() == (2,)
    kept.cache.evict(0, 2)
    assert kept.partition.num_used == 0


def test_what_nobody_uses_is_given_up_though_what_follows_it_is_in_use(kept: Kept) -> None:
    keys = kept.keep([1] * 12)
    _, known = named([1] * 12)
    *_, last = kept.cache.match(keys.keys, known)
    kept.cache.shared.retain("exact", last.copies[0])

    assert kept.cache.idle_units() == (2,)
    kept.cache.evict(0, 1)

    # The last block is not found any more, and still its user's.
    assert kept.num_matched([1] * 12) == 1
    assert kept.partition.num_used == 2


def test_contexts_outlive_other_blocks_and_pinned_ones_everything(kept: Kept) -> None:
    held = kept.keep([1] * 8)
    pinned = kept.keep([2] * 8)
    kept.keep([3] * 8)
    kept.cache.hold(held.keys, "held", pinned=False)
    kept.cache.hold(pinned.keys, "pinned", pinned=True)
    kept.cache.evict(0, 2)
    assert [kept.num_matched([token] * 8) for token in (1, 2, 3)] == [2, 2, 0]
    kept.cache.evict(0, 100)
    assert [kept.num_matched([token] * 8) for token in (1, 2)] == [0, 2]
    kept.cache.let_go(pinned.keys, "pinned")
    kept.cache.evict(0, 100)

    assert kept.partition.num_used == 0


def test_the_partition_takes_what_is_idle_when_it_is_wanted() -> None:
    kept = Kept(num_blocks=8)
    kept.keep([1] * 32)
    table = BlockTable(1)

    assert kept.partition.append(table, Rank(0)) is None
    assert kept.partition.make_room(table)
    assert kept.partition.append(table, Rank(0)) is not None
    assert kept.num_matched([1] * 32) == 7


def test_a_tree_is_dropped_with_all_that_follows_what_no_context_holds(kept: Kept) -> None:
    first = kept.keep([1] * 8)
    kept.keep([*[1] * 8, *[2] * 8])
    kept.cache.hold(first.keys[:1], "context", pinned=False)

    assert kept.cache.first_unheld(first.keys) == first.keys[1]
    dropped = kept.cache.drop_tree(first.keys[1])
    assert len(dropped) == 3
    assert kept.num_matched([1] * 8) == 1
    for codec, entry in dropped:
        kept.cache.shared.release(codec, entry)
    assert kept.partition.num_used == 1


@pytest.mark.parametrize(
    ("num_blocks", "exact", "encoded"),
    [(1, [0], []), (3, [0, 1, 2], []), (6, [0, 4, 5], [1, 2, 3])],
)
def test_a_codec_needs_its_latest_blocks_exact(
    num_blocks: int, exact: list[int], encoded: list[int]
) -> None:
    forms = HeldForms((None,), 4, codec="int4", region=ExactRegion(2)).at(num_blocks)
    needs = [forms.needs(entry)[0] for entry in range(num_blocks)]

    assert [entry for entry, form in enumerate(needs) if form is Form.EXACT] == exact
    assert [entry for entry, form in enumerate(needs) if form is Form.ENCODED] == encoded


def test_windows_need_what_the_next_row_reads() -> None:
    forms = HeldForms((6, None), 4, recent_blocks=2).at(5)
    needs = [forms.needs(entry) for entry in range(5)]

    assert [form is Form.NONE for form, _ in needs] == [True, True, True, False, False]
    assert [form is Form.NONE for _, form in needs] == [False, True, True, True, False]


def test_an_encoded_block_is_free_when_its_last_user_leaves() -> None:
    encoded = EncodedPool(BlockPool(8), blocks_per_page=4)
    block = encoded.allocate()
    assert block is not None
    encoded.retain(block)
    encoded.retain(block)
    assert encoded.num_users(block) == 3
    for left in (2, 1, 0):
        encoded.release(block)
        assert encoded.num_users(block) == left

    assert encoded.num_pages == 0
    with pytest.raises(ValueError, match="free"):
        encoded.retain(block)


def test_an_entry_says_what_it_holds_in_each_group() -> None:
    held = TableEntry(Rank(1), (3, -1), (-1, 7)).held()  # type: ignore[arg-type]

    assert [(block.block_id, block.encoded_id) for block in held] == [(3, -1), (-1, 7)]
