"""What a tenant keeps in the prefix cache, as the front door sees it.

The engine implements `CacheBackend` beside `Backend`. All records are `msgspec` Structs. Nothing in
them is made of tokens or of what tokens are called: ids are random.
"""

from enum import StrEnum
from typing import Protocol

import msgspec

from kvcluster.types import TenantId


class Standing(StrEnum):
    """Why an entry is kept."""

    IDLE = "idle"
    """Nobody uses it: it goes when memory is wanted, or when it is purged."""
    IN_USE = "in_use"
    """A running generation or upload reads or writes it."""
    IN_CONTEXT = "in_context"
    """It is a context's: it goes with that."""
    PINNED = "pinned"
    """It is a pinned context's."""


class CacheEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A run of blocks that follow each other, of which all have the same standing. Another entry
    may come before it, and several after. Every kept block is in one entry."""

    entry: str
    """Names its first block, for as long as that is kept."""
    model: str
    policy: str
    cache_namespace: str
    start_token: int
    """How many tokens come before it in its prompt."""
    num_tokens: int
    num_bytes: int
    """As stored, its part of encoded pages included."""
    standing: Standing
    last_use_s: float
    """Unix seconds."""


class CachePurge(msgspec.Struct, frozen=True, kw_only=True):
    """What to give up, as far as nobody uses it."""

    entries: tuple[str, ...] = ()
    """These and what follows them; empty: all."""
    cache_namespace: str | None = None
    """Only what is in it; None: in any."""
    validates_only: bool = False


class CacheAmount(msgspec.Struct, frozen=True):
    num_entries: int = 0
    num_bytes: int = 0

    def __add__(self, other: "CacheAmount") -> "CacheAmount":
        return CacheAmount(self.num_entries + other.num_entries, self.num_bytes + other.num_bytes)


class CachePurged(msgspec.Struct, frozen=True, kw_only=True):
    """What became of all that was to be given up."""

    given_up: CacheAmount = CacheAmount()
    in_use: CacheAmount = CacheAmount()
    in_contexts: CacheAmount = CacheAmount()
    followed: CacheAmount = CacheAmount()
    """Nobody uses it, but what stays is found through it."""
    found: frozenset[str] = frozenset()
    """Those of `CachePurge.entries` that are there."""


class CacheBackend(Protocol):
    """Every method may raise any `KvClusterError`."""

    async def list_cache_entries(self, tenant: TenantId) -> tuple[CacheEntry, ...]:
        """In no order. Published prefixes are the operators', and in no tenant's list."""
        ...

    async def purge_cache_entries(self, tenant: TenantId, wanted: CachePurge) -> CachePurged:
        """Give up what is idle. Returns when the ranks have zeroed it. Another tenant's entries are
        not found, exactly as those that do not exist."""
        ...
