"""The blocks of one rank and one KV group: which are free, and who counts on those that are not.

Lives in the engine process; the rank's tensors are `cache/store.py`. Attention reads blocks with
consecutive ids as one view without a copy, so ids are handed out to make long runs.

`PAGE_BLOCKS` neighbours are a page. Encoded blocks, which are smaller, take whole pages: see
`encoded_pool`.
"""

import heapq
from dataclasses import dataclass

from kvcluster.types import PAGE_BLOCKS, BlockId


@dataclass(frozen=True, slots=True)
class BlockPoolStatistics:
    """A snapshot of one pool."""

    num_blocks: int
    num_free: int
    num_free_runs: int
    largest_free_run: int


class BlockPool:
    """Owner of the reference counts of `num_blocks` blocks. A block with count 0 is free."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._num_free = num_blocks
        # A free run [start, end) is known by both ends, so that a released block finds its
        # neighbours at once. The heap may hold runs that are gone; they are skipped when met.
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._longest_first: list[tuple[int, int]] = []
        self._num_free_pages = 0
        if num_blocks:
            self._add_run(0, num_blocks)

    @property
    def num_free(self) -> int:
        return self._num_free

    def ref_count(self, block_id: BlockId) -> int:
        return self._ref_counts[block_id]

    def allocate(self, after: BlockId | None) -> BlockId | None:
        """Take a free block with reference count 1; None when there is none.

        `after` is the sequence's last block here: its successor is taken when that is free.
        Otherwise the middle of the largest free run, so that the run's left neighbour can grow
        too; the start of the run where it has no left neighbour.
        """
        if not self._num_free:
            return None
        if after is not None and after + 1 in self._end_of:
            block = after + 1
        else:
            start, end = self._largest_run()
            block = start if start == 0 else (start + end) // 2
        return self._use(block)

    def allocate_lowest(self) -> BlockId | None:
        """Take the free block with the lowest id, for blocks that come and go: they find memory
        that was used before, and leave the rest untouched. None when there is none."""
        return self._use(min(self._end_of)) if self._num_free else None

    def _use(self, block: int, *, run: int | None = None) -> BlockId:
        """Take a block of the free run that starts at `run`; None: it starts one, or lies in the
        largest."""
        self._take(block, run)
        self._ref_counts[block] = 1
        self._num_free -= 1
        return BlockId(block)

    def allocate_in_broken_page(self, after: BlockId | None) -> BlockId | None:
        """Take a free block of a page that has others in use, so that no whole page is lost; None
        when there is none. `after`: as for `allocate`, where its successor is such a block."""
        if after is not None and (after + 1) % PAGE_BLOCKS and after + 1 in self._end_of:
            return self._use(after + 1)
        broken = [
            (_broken_block(start, end), start)
            for start, end in self._end_of.items()
            if start % PAGE_BLOCKS or end % PAGE_BLOCKS
        ]
        if not broken:
            return None
        block, start = min(broken)
        return self._use(block, run=start)

    @property
    def num_free_pages(self) -> int:
        """Pages whose blocks are all free."""
        return self._num_free_pages

    def allocate_page(self) -> int | None:
        """Take all blocks of a free page; returns its number, None when no page is free.

        It comes from the end of the shortest run that has one, out of the way of sequences that
        grow.
        """
        fitting = [
            (end - start, start, end)
            for start, end in self._end_of.items()
            if end // PAGE_BLOCKS > -(-start // PAGE_BLOCKS)
        ]
        if not fitting:
            return None
        _, start, end = min(fitting)
        page = end // PAGE_BLOCKS - 1
        self._drop_run(start)
        first, last = page * PAGE_BLOCKS, (page + 1) * PAGE_BLOCKS
        if start < first:
            self._add_run(start, first)
        if last < end:
            self._add_run(last, end)
        for block in range(first, last):
            self._ref_counts[block] = 1
        self._num_free -= PAGE_BLOCKS
        return page

    def release_page(self, page: int) -> None:
        """Give back what `allocate_page` took."""
        for block in range(page * PAGE_BLOCKS, (page + 1) * PAGE_BLOCKS):
            self.release(BlockId(block))

    def retain(self, block_id: BlockId) -> None:
        """Add a user to a block that is in use."""
        if self._ref_counts[block_id] < 1:
            raise ValueError(f"block {block_id} is free: allocate it first")
        self._ref_counts[block_id] += 1

    def release(self, block_id: BlockId) -> None:
        """Take one user away; the last one's leaving frees the block."""
        if self._ref_counts[block_id] < 1:
            raise ValueError(f"block {block_id} is free already")
        self._ref_counts[block_id] -= 1
        if self._ref_counts[block_id]:
            return
        self._num_free += 1
        start, end = int(block_id), int(block_id) + 1
        if start in self._start_of:
            start = self._drop_run(self._start_of[start])[0]
        if end in self._end_of:
            end = self._drop_run(end)[1]
        self._add_run(start, end)

    def statistics(self) -> BlockPoolStatistics:
        lengths = [end - start for start, end in self._end_of.items()]
        return BlockPoolStatistics(
            num_blocks=self.num_blocks,
            num_free=self._num_free,
            num_free_runs=len(lengths),
            largest_free_run=max(lengths, default=0),
        )

    def _take(self, block: int, run: int | None) -> None:
        start = run
        if start is None:
            start = block if block in self._end_of else self._largest_run()[0]
        start, end = self._drop_run(start)
        if start < block:
            self._add_run(start, block)
        if block + 1 < end:
            self._add_run(block + 1, end)

    def _largest_run(self) -> tuple[int, int]:
        while True:
            negative_length, start = self._longest_first[0]
            if self._end_of.get(start) == start - negative_length:
                return start, start - negative_length
            heapq.heappop(self._longest_first)

    def _add_run(self, start: int, end: int) -> None:
        self._end_of[start] = end
        self._start_of[end] = start
        self._num_free_pages += _num_pages(start, end)
        heapq.heappush(self._longest_first, (start - end, start))
        if len(self._longest_first) > 64 + 4 * len(self._end_of):
            self._longest_first = [(first - last, first) for first, last in self._end_of.items()]
            heapq.heapify(self._longest_first)

    def _drop_run(self, start: int) -> tuple[int, int]:
        end = self._end_of.pop(start)
        del self._start_of[end]
        self._num_free_pages -= _num_pages(start, end)
        return start, end


def _num_pages(start: int, end: int) -> int:
    """Whole pages in the run [start, end)."""
    return max(0, end // PAGE_BLOCKS - -(-start // PAGE_BLOCKS))


def _broken_block(start: int, end: int) -> int:
    """The first block of a free run in a page that the run does not fill."""
    return start if start % PAGE_BLOCKS else max(start, end // PAGE_BLOCKS * PAGE_BLOCKS)
