"""What requests of one tenant share: finds the kept blocks with which one begins, and keeps those
that it leaves.

A request begins after the longest kept prefix at which it can go on as if it had computed all of it
(`cache/held_forms`): with the exact policy and no windows after any block, else where an earlier
prompt, answer or context ended. Policies that keep tokens by score or select blocks know more of a
sequence than its blocks, so theirs are not shared.
"""

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

from kvcluster.cache.block_keys import BlockKey, BlockKeys, Scope
from kvcluster.cache.block_table import TableEntry
from kvcluster.cache.held_forms import Form, HeldForms
from kvcluster.cache.partition import Partition
from kvcluster.cache.partitions import CachePartitions
from kvcluster.cache.prefix_cache import Dropped, PrefixCache
from kvcluster.cache.shared_blocks import SharedBlocks
from kvcluster.config import CacheConfig
from kvcluster.engine.api import CacheMode, GenerationRequest
from kvcluster.engine.plan import NewBlock, Release, SequenceStart
from kvcluster.engine.prefix_keys import PrefixKeys
from kvcluster.engine.published_prefixes import PublishedPrefixes, longest
from kvcluster.engine.request import Request
from kvcluster.retention.offered import budgeted, recent_blocks
from kvcluster.types import DEFAULT_TENANT, PUBLISHED, ModelSpec, Policy, TenantId

_MAX_POLICIES: Final = 256
"""Whose rules are kept at hand."""


class Prefixes:
    """Sharing of blocks within each tenant's partition. Mutates requests and their tables."""

    def __init__(self, spec: ModelSpec, *, cache: CacheConfig, partitions: CachePartitions) -> None:
        self.unix_time: Callable[[], float] = time.time
        """When a block is used."""
        self._spec = spec
        self._block_size = cache.block_size
        self.is_on = cache.prefix_cache
        """Whether blocks outlive requests that build no context."""
        self._partitions = partitions
        self._forms = lru_cache(_MAX_POLICIES)(self._forms_of)
        self._caches: dict[TenantId, PrefixCache] = {}
        self._published = PublishedPrefixes(self.cache(PUBLISHED))

    def cache(self, tenant: TenantId) -> PrefixCache:
        """What is kept in the tenant's partition."""
        found = self._caches.get(tenant)
        if found is None:
            found = self._caches[tenant] = PrefixCache(
                self._partitions.of(tenant), lambda: self.unix_time()
            )
        return found

    def tenants(self) -> set[TenantId]:
        """Those of which something is kept."""
        return {tenant for tenant, cache in self._caches.items() if len(cache)}

    def clear(self) -> None:
        """Forget everything: the ranks have lost it."""
        for cache in self._caches.values():
            cache.clear()

    def idle_on_ranks(self) -> tuple[int, ...]:
        """Per rank, blocks of all tenants that come free when they are wanted."""
        none = (0,) * self._partitions.num_ranks
        idle = [none, *(cache.idle_on_ranks() for cache in self._caches.values())]
        return tuple(map(sum, zip(*idle, strict=True)))

    def keys(self, policy: Policy, namespace: str, secret: bytes) -> BlockKeys:
        """For the blocks of one sequence."""
        scope = Scope(self._spec.weights_digest, str(policy), self._block_size, namespace)
        return BlockKeys(secret, scope)

    def forms(self, policy: Policy) -> HeldForms:
        """What a sequence with the policy holds, by its length."""
        return self._forms(policy)

    def is_shareable(self, policy: Policy) -> bool:
        """Whether a sequence's blocks are all that its later rows depend on."""
        is_by_score = budgeted(policy.retention, self._block_size) is not None
        return not is_by_score and policy.selection == Policy().selection

    def prefix_of(
        self, spec: GenerationRequest, policy: Policy, secret: bytes, published_secret: bytes
    ) -> PrefixKeys | None:
        """How a request without a context shares; None: not at all. `published_secret`: of the
        tenant `PUBLISHED`."""
        is_off = not self.is_on or spec.cache_mode is CacheMode.BYPASS
        if is_off or not self.is_shareable(policy):
            return None
        return PrefixKeys(
            self.keys(policy, spec.cache_namespace, secret),
            # Kept blocks come without the rows that score their tokens.
            reads=spec.sampling.prompt_logprobs is None,
            writes=spec.cache_mode is CacheMode.READ_WRITE,
            published_keys=self.keys(policy, "", published_secret),
        )

    def known_tokens(self, request: Request) -> int:
        """Tokens of an incomplete prompt that were there already when they came: there is nothing
        to compute before one comes that was not."""
        prefix = request.prefix
        if prefix is None or not prefix.reads or request.is_prompt_complete:
            return 0
        prefix.extend(request.tokens)
        published = self._published.extend(request)
        start = max(prefix.num_matched, len(published))
        after = published[-1] if published and start == len(published) else None
        found = self._cache_of(request).match(prefix.readable, request.tokens, start, after)
        prefix.num_matched = start + len(found)
        return prefix.num_matched * self._block_size

    @contextmanager
    def present(self, request: Request) -> Iterator[list[TableEntry]]:
        """What the request could begin with, which nothing evicts inside the `with` block."""
        entries, codec = self._present(request), request.policy.storage
        owners = [self._owner(request, index) for index in range(len(entries))]
        for shared, entry in zip(owners, entries, strict=True):
            shared.retain(codec, entry)
        try:
            yield entries
        finally:
            for shared, entry in zip(owners, entries, strict=True):
                shared.release(codec, entry)

    def _owner(self, request: Request, index: int) -> SharedBlocks:
        """Where the blocks of an entry that the request begins with are counted."""
        prefix = request.prefix
        is_published = prefix is not None and index < len(prefix.adopted)
        return self._published.shared if is_published else self._cache_of(request).shared

    def _present(self, request: Request) -> list[TableEntry]:
        prefix = request.prefix
        if prefix is None or not prefix.reads:
            return []
        prefix.extend(request.tokens)
        cache = self._cache_of(request)
        own = cache.match(prefix.readable, request.tokens)
        published = self._published.match(request)
        after = published and cache.match(
            prefix.readable, request.tokens, len(published), published[-1]
        )
        blocks, num_published = longest(published, own, after)
        # The row of the last token has to be computed: it samples. And a build that has nothing to
        # compute is not started.
        most = (len(request.tokens) - 1) // self._block_size
        if request.builds_context:
            most = min(most, len(request.tokens) // self._block_size - 1)
        entries = cache.usable(blocks, self._forms(request.policy), most)
        prefix.adopted = blocks[: min(num_published, len(entries))]
        cache.touch(blocks[len(prefix.adopted) : len(entries)])
        return entries

    def adopt(self, request: Request, entries: list[TableEntry]) -> list[NewBlock] | None:
        """Begin the request's empty table with these entries. None, and nothing taken: there is no
        room for what goes with them."""
        table = request.table
        assert table is not None
        assert not len(table), "a request adopts blocks before it computes any"
        adopted, cache = [], self._cache_of(request)
        for index, entry in enumerate(entries):
            owner = self._owner(request, index)
            lender = owner if owner is self._published.shared else None
            added = cache.shared.adopt(table, entry, lender)
            if added is None:
                cache.shared.partition.release_all(table)
                table.clear()
                assert request.prefix is not None
                request.prefix.adopted = ()
                return None
            adopted.append(NewBlock(added.rank, added.block_ids, added.encoded_ids))
        if adopted:
            for group, released in enumerate(self._forms(request.policy).at(len(adopted)).released):
                table.released_below[group] = released.stop if released else 0
        request.num_planned = len(adopted) * self._block_size
        if not request.peak_tokens:
            request.num_cached = request.num_planned
        cache.count_hits(len(adopted))
        return adopted

    def told_at_start(self, request: Request, adopted: Sequence[NewBlock]) -> SequenceStart:
        """What the ranks are told of a request that starts."""
        assert request.sequence is not None
        sampling = request.spec.sampling
        ids = request.packed_ids(0, request.num_planned) if sampling.counts_tokens else b""
        return SequenceStart(request.sequence, sampling, request.policy, tuple(adopted), ids)

    def released_at_start(self, request: Request) -> list[Release]:
        """Entries that a request which starts has adopted without their blocks."""
        table = request.table
        assert table is not None
        assert request.sequence is not None
        return [
            Release(
                request.sequence,
                group,
                below,
                int(table.recent_blocks is not None and self._spec.windows[group] is None),
            )
            for group, below in enumerate(table.released_below)
            if below
        ]

    def keep_after(self, request: Request, *, ends_prompt: bool) -> None:
        """A step of the request is planned, and nothing that it leaves unread is free yet: keep
        what a context lacked, and what another request with this prompt would begin with."""
        if request.num_planned == request.checkpoint:
            self._keep_blocks(request, request.checkpoint // self._block_size)
        if ends_prompt:
            self._keep(request, (request.num_prompt_tokens - 1) // self._block_size)

    def keep(self, request: Request) -> None:
        """The request ends or is preempted: keep what it leaves."""
        num_known = min(request.num_planned, len(request.tokens))
        self._keep(request, num_known // self._block_size)

    def held_at(
        self, tenant: TenantId, keys: BlockKeys, tokens: "array[int]", policy: Policy
    ) -> list[TableEntry]:
        """What a sequence of just these tokens' whole blocks begins with; empty unless all of it is
        there."""
        cache = self.cache(tenant)
        blocks = cache.match(keys.keys, tokens)
        if len(blocks) < len(keys.keys):
            return []
        entries = cache.usable(blocks, self._forms(policy), len(blocks))
        return entries if len(entries) == len(blocks) else []

    def _keep(self, request: Request, num_blocks: int) -> None:
        if request.prefix is not None and request.prefix.writes:
            self._keep_blocks(request, num_blocks)

    def _keep_blocks(self, request: Request, num_blocks: int) -> None:
        prefix, table = request.prefix, request.table
        if prefix is None or table is None or num_blocks < 1:
            return
        prefix.extend(request.tokens)
        forms = self._forms(request.policy)
        cache = self._cache_of(request)
        cache.keep(prefix.blocks.keys, request.tokens, table, forms, num_blocks, prefix.adopted)
        cache.note_scope(prefix.blocks.keys[len(prefix.adopted) :], prefix.blocks.scope)

    def forget(
        self, tenant: TenantId, keys: Sequence[BlockKey], requests: Iterable[Request]
    ) -> list[Dropped]:
        """Drop the blocks of these names, of one prefix, that no context holds, with all that
        follows them, for the caller to release. Those of the requests that use them keep none."""
        first = self.cache(tenant).first_unheld(keys)
        if first is None:
            return []
        for request in requests:
            own = [] if request.prefix is None else request.prefix.blocks.keys
            if request.prefix is not None and first in own:
                request.prefix.writes, request.checkpoint = False, 0
        return self.cache(tenant).drop_tree(first)

    def num_exact(self, entries: list[TableEntry], policy: Policy) -> tuple[int, ...]:
        """Exact blocks' worth per KV group that entries save, rounded down."""
        return tuple(map(int, self.num_blocks(entries, policy)))

    def num_blocks(self, entries: list[TableEntry], policy: Policy) -> tuple[float, ...]:
        """Exact blocks' worth per KV group that a sequence of just these entries holds."""
        saved = [0.0] * len(self._spec.windows)
        share = self._any_partition.stored_share(policy.storage)
        at = self._forms(policy).at(len(entries))
        for index in range(len(entries)):
            for group, form in enumerate(at.needs(index)):
                saved[group] += {Form.NONE: 0.0, Form.EXACT: 1.0, Form.ENCODED: share}[form]
        return tuple(saved)

    def _cache_of(self, request: Request) -> PrefixCache:
        return self.cache(request.spec.tenant)

    @property
    def _any_partition(self) -> Partition:
        """For what is the same in all of them."""
        return self._partitions.of(DEFAULT_TENANT)

    def _forms_of(self, policy: Policy) -> HeldForms:
        return HeldForms(
            windows=self._spec.windows,
            block_size=self._block_size,
            codec=policy.storage,
            region=self._any_partition.exact_region(policy.storage),
            recent_blocks=recent_blocks(policy.retention, self._block_size),
        )
