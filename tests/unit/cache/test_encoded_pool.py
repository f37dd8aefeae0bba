"""Encoded blocks come out of whole pages, beside exact blocks that come and go."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.encoded_pool import EncodedPool
from kvcluster.types import PAGE_BLOCKS, BlockId

NUM_PAGES = 4
NUM_BLOCKS = NUM_PAGES * PAGE_BLOCKS + 3
"""The last three blocks are no page."""


class Sharing(RuleBasedStateMachine):
    """Two codecs and exact blocks in one pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.encoded = {size: EncodedPool(self.pool, size) for size in (3, 20)}
        self.exact_ids: list[BlockId] = []
        self.encoded_ids: dict[int, list[BlockId]] = {3: [], 20: []}

    @rule()
    def take_exact(self) -> None:
        could = self.pool.num_free
        block_id = self.pool.allocate(self.exact_ids[-1] if self.exact_ids else None)
        assert (block_id is not None) == (could > 0)
        if block_id is not None:
            self.exact_ids.append(block_id)

    @precondition(lambda self: self.exact_ids)
    @rule(data=st.data())
    def release_exact(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.exact_ids))
        self.exact_ids.remove(block_id)
        self.pool.release(block_id)

    @rule(size=st.sampled_from((3, 20)))
    def take_encoded(self, size: int) -> None:
        could = self.encoded[size].num_free
        block_id = self.encoded[size].allocate()
        assert (block_id is not None) == (could > 0)
        if block_id is not None:
            assert block_id not in self.encoded_ids[size]
            self.encoded_ids[size].append(block_id)

    @precondition(lambda self: any(self.encoded_ids.values()))
    @rule(data=st.data())
    def release_encoded(self, data: st.DataObject) -> None:
        size = data.draw(st.sampled_from([size for size, ids in self.encoded_ids.items() if ids]))
        block_id = data.draw(st.sampled_from(self.encoded_ids[size]))
        self.encoded_ids[size].remove(block_id)
        self.encoded[size].release(block_id)

    @invariant()
    def nobody_shares_a_page(self) -> None:
        pages_of = {
            size: {block_id // size for block_id in ids} for size, ids in self.encoded_ids.items()
        }
        exact_pages = {block_id // PAGE_BLOCKS for block_id in self.exact_ids}
        assert not pages_of[3] & pages_of[20]
        assert not exact_pages & (pages_of[3] | pages_of[20])
        for size, pages in pages_of.items():
            assert self.encoded[size].num_pages == len(pages)
            assert all(page < NUM_PAGES for page in pages)

    @invariant()
    def every_block_is_counted(self) -> None:
        pages = sum(pool.num_pages for pool in self.encoded.values())
        assert self.pool.num_free == NUM_BLOCKS - len(self.exact_ids) - pages * PAGE_BLOCKS


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


def test_pages_come_from_the_end_so_that_a_growing_sequence_stays_together() -> None:
    pool = BlockPool(4 * PAGE_BLOCKS)
    encoded = EncodedPool(pool, 5)
    first = pool.allocate(None)

    assert encoded.allocate() == 3 * 5
    assert first == 0
    assert pool.allocate(first) == 1


def test_a_block_is_released_once() -> None:
    encoded = EncodedPool(BlockPool(PAGE_BLOCKS), 5)
    block_id = encoded.allocate()
    other = encoded.allocate()
    assert block_id is not None
    assert other is not None
    encoded.release(block_id)

    with pytest.raises(ValueError, match="free already"):
        encoded.release(block_id)
