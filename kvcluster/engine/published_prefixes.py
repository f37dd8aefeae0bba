"""Prefixes that operators publish: every tenant's requests may begin with them, nobody writes them.

They are contexts of a tenant that no credential speaks for, pinned, in a partition of their own. So
what they take is the operator's and no tenant's, they are never evicted, and whether a prompt
begins with one says nothing of what other tenants did. Requests that bypass the cache, and those on
a context, do without.
"""

from collections.abc import Sequence

from kvcluster.cache.block_keys import BlockKeys
from kvcluster.cache.prefix_cache import CachedBlock, PrefixCache
from kvcluster.cache.shared_blocks import SharedBlocks
from kvcluster.engine.request import Request
from kvcluster.types import PUBLISHED


class PublishedPrefixes:
    """Finds the published blocks with which a prompt begins."""

    def __init__(self, cache: PrefixCache) -> None:
        """`cache`: of the tenant `PUBLISHED`."""
        self._cache = cache

    @property
    def shared(self) -> SharedBlocks:
        return self._cache.shared

    def extend(self, request: Request) -> list[CachedBlock]:
        """Those of what is known of the prompt so far, beyond what was found before."""
        keys = self._keys(request)
        if keys is None:
            return []
        assert request.prefix is not None
        found = request.prefix.published
        found += self._cache.match(keys.keys, request.tokens, len(found))
        return found

    def match(self, request: Request) -> list[CachedBlock]:
        """Those that are there now."""
        if request.prefix is not None:
            request.prefix.published = []
        return self.extend(request)

    def _keys(self, request: Request) -> BlockKeys | None:
        """The names of the prompt's blocks among the published ones; None: there are none."""
        prefix = request.prefix
        is_its_own = request.spec.tenant == PUBLISHED
        if prefix is None or prefix.published_keys is None or is_its_own or not len(self._cache):
            return None
        prefix.published_keys.extend(request.tokens)
        return prefix.published_keys


def longest(
    published: Sequence[CachedBlock], own: Sequence[CachedBlock], after: Sequence[CachedBlock]
) -> tuple[list[CachedBlock], int]:
    """What a prompt begins with, and how much of it is published: the tenant's own blocks alone, or
    the published ones with the tenant's own that come `after` them. Of equal lengths the published
    ones, which are there for everybody."""
    if len(own) > len(published) + len(after):
        return list(own), 0
    return [*published, *after], len(published)
