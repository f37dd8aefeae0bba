"""What one request's blocks are called, and what it may do with those that are kept."""

import secrets
from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

from kvcluster.cache.block_keys import SECRET_BYTES, BlockKey, BlockKeys
from kvcluster.cache.prefix_cache import CachedBlock
from kvcluster.types import TenantId


class PrefixKeys:
    """Mutable: the names of a request's blocks, as its prompt comes in."""

    def __init__(
        self,
        keys: BlockKeys,
        *,
        reads: bool,
        writes: bool,
        most_blocks: int | None = None,
        published_keys: BlockKeys | None = None,
    ) -> None:
        """`most_blocks`: only so many of the first ones are read; None: all that are there.
        `published_keys`: the same blocks' names among the published ones; None: these are not
        read."""
        self.published_keys = published_keys
        self.published: list[CachedBlock] = []
        """Published blocks with which the prompt begins, as far as it is known."""
        self.adopted: Sequence[CachedBlock] = ()
        """Those of them that the request's table begins with."""
        self.blocks = keys
        self.most_blocks = most_blocks
        self.reads = reads
        """Blocks that are there are not computed again."""
        self.writes = writes
        """Its blocks are kept for others."""
        self.num_matched = 0
        """Blocks of the prompt that were there when it was last looked at."""

    @property
    def readable(self) -> list[BlockKey]:
        """The names under which blocks may be read."""
        keys = self.blocks.keys
        return keys if self.most_blocks is None else keys[: self.most_blocks]

    def extend(self, tokens: "array[int]") -> None:
        """Take in tokens that became known. `tokens`: all of the request."""
        self.blocks.extend(tokens)


def process_secrets() -> Callable[[TenantId], bytes]:
    """A secret for each tenant that lives as long as this process, which is as long as the blocks
    in memory that it names."""
    root = secrets.token_bytes(SECRET_BYTES)

    def secret_of(tenant: TenantId) -> bytes:
        return blake2b(tenant.encode(), key=root, digest_size=SECRET_BYTES).digest()

    return secret_of
