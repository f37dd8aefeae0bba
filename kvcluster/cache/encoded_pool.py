"""The encoded blocks of one codec, out of the pages of a block pool. Torch-free.

Pages are taken when blocks are needed and given back when their last block is released, so codecs
share a rank's memory with each other and with exact blocks. Block b is block b % blocks_per_page
of page b // blocks_per_page.
"""

from kvcluster.cache.block_pool import BlockPool
from kvcluster.types import BlockId


class EncodedPool:
    """Blocks of one size for one owner of pages. Mutates `pool`."""

    def __init__(self, pool: BlockPool, blocks_per_page: int) -> None:
        self.blocks_per_page = blocks_per_page
        self._pool = pool
        self._free_of: dict[int, set[int]] = {}
        """By page that is ours: its free blocks."""
        self._partial: dict[int, None] = {}
        """Pages with free blocks, the oldest first: those are filled before others are begun."""
        self._more_users: dict[BlockId, int] = {}
        """By block with more than one user: how many more."""

    @property
    def num_pages(self) -> int:
        """Pages that this pool holds."""
        return len(self._free_of)

    @property
    def has_partial(self) -> bool:
        """Whether a block can be had without another page."""
        return bool(self._partial)

    @property
    def num_free(self) -> int:
        """Blocks that could be allocated."""
        in_partial = sum(len(self._free_of[page]) for page in self._partial)
        return in_partial + self._pool.num_free_pages * self.blocks_per_page

    def allocate(self) -> BlockId | None:
        """Take a block; None when there is none."""
        page = next(iter(self._partial), None)
        if page is None:
            page = self._pool.allocate_page()
            if page is None:
                return None
            first = page * self.blocks_per_page
            self._free_of[page] = set(range(first, first + self.blocks_per_page))
            self._partial[page] = None
        free = self._free_of[page]
        block_id = min(free)
        free.remove(block_id)
        if not free:
            del self._partial[page]
        return BlockId(block_id)

    def num_users(self, block_id: BlockId) -> int:
        """Who counts on a block; 0: it is free."""
        page = block_id // self.blocks_per_page
        if page not in self._free_of or block_id in self._free_of[page]:
            return 0
        return 1 + self._more_users.get(block_id, 0)

    def retain(self, block_id: BlockId) -> None:
        """Add a user to a block that is in use."""
        if not self.num_users(block_id):
            raise ValueError(f"encoded block {block_id} is free: allocate it first")
        self._more_users[block_id] = self.num_users(block_id)

    def release(self, block_id: BlockId) -> None:
        """Take one user away; the last one's leaving frees the block. Raises: ValueError when it is
        free already."""
        num_users = self.num_users(block_id)
        if not num_users:
            raise ValueError(f"encoded block {block_id} is free already")
        if num_users > 1:
            del self._more_users[block_id]
            if num_users > 2:
                self._more_users[block_id] = num_users - 2
            return
        page = block_id // self.blocks_per_page
        free = self._free_of[page]
        free.add(block_id)
        self._partial[page] = None
        if len(free) == self.blocks_per_page:
            del self._free_of[page]
            del self._partial[page]
            self._pool.release_page(page)
