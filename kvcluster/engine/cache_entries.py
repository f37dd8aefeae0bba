"""What a tenant keeps, cut into entries, and giving up those that nobody uses. Engine process."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from kvcluster.cache.block_keys import Scope
from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.cache.prefix_cache import CachedBlock, Dropped, PrefixCache
from kvcluster.engine.cache_api import (
    CacheAmount,
    CacheEntry,
    CachePurge,
    CachePurged,
    Standing,
)
from kvcluster.types import NO_BLOCK, ModelSpec


class _Run(NamedTuple):
    """An entry: blocks that follow each other."""

    blocks: list[CachedBlock]
    scope: Scope
    num_before: int
    """Blocks before its first one, published ones included."""
    standing: Standing
    parent: int | None
    """Place, in the list of all runs, of the one before it."""


class CacheEntries:
    """The entries of one tenant's cache, as it is now."""

    def __init__(self, cache: PrefixCache, spec: ModelSpec, block_size: int) -> None:
        self._cache = cache
        self._model = spec.name
        self._block_size = block_size
        self._block_bytes = block_bytes_per_group(spec, block_size)

    def entries(self, new_id: Callable[[], str]) -> Iterator[CacheEntry]:
        """All of them. Gives those an id that have none."""
        for run in self._runs():
            first = run.blocks[0]
            first.label = first.label or new_id()
            yield CacheEntry(
                entry=first.label,
                model=self._model,
                policy=run.scope.policy,
                cache_namespace=run.scope.namespace,
                start_token=run.num_before * self._block_size,
                num_tokens=len(run.blocks) * self._block_size,
                num_bytes=self._num_bytes(run),
                standing=run.standing,
                last_use_s=max(block.last_use_s for block in run.blocks),
            )

    def purge(self, wanted: CachePurge) -> tuple[CachePurged, list[Dropped]]:
        """What becomes of all that is wanted. What is given up is forgotten, and its users are the
        caller's to take away; none, where this only validates."""
        runs = self._runs(set(wanted.entries))
        is_wanted = _wanted(runs, wanted)
        amounts: defaultdict[str, CacheAmount] = defaultdict(CacheAmount)
        followed: set[int | None] = set()
        dropped: list[Dropped] = []
        # Those before come first, so this meets what follows a run before the run.
        for place in range(len(runs) - 1, -1, -1):
            run = runs[place]
            fate = _STAYS[run.standing] or ("followed" if place in followed else "given_up")
            if not is_wanted[place] or fate != "given_up":
                followed.add(run.parent)
            if not is_wanted[place]:
                continue
            amounts[fate] += CacheAmount(1, self._num_bytes(run))
            if fate == "given_up" and not wanted.validates_only:
                for block in reversed(run.blocks):
                    dropped += self._cache.give_up(block)
        labels = {run.blocks[0].label for run in runs}
        return CachePurged(found=frozenset(labels & set(wanted.entries)), **amounts), dropped

    def _runs(self, cuts: Collection[str] = ()) -> list[_Run]:
        """Every run before those that follow it. `cuts`: blocks of these names begin one."""
        after: defaultdict[int, list[CachedBlock]] = defaultdict(list)
        first: list[CachedBlock] = []
        for block in self._cache.blocks():
            parent = block.parent
            if parent is not None and self._cache.has(parent):
                after[id(parent)].append(block)
            else:
                first.append(block)
        runs: list[_Run] = []
        stack: list[tuple[CachedBlock, Scope, int, int | None]] = []
        # Many follow one published prefix, which may be long.
        published: dict[int, int] = {}
        for block in first:
            assert block.scope is not None, "noted when it was kept"
            before = id(block.parent)
            if before not in published:
                published[before] = _num_before(block)
            stack.append((block, block.scope, published[before], None))
        while stack:
            block, scope, num_before, parent_run = stack.pop()
            blocks, standing = [block], self._standing(block)
            while len(next_ones := after[id(blocks[-1])]) == 1:
                (block,) = next_ones
                if block.label in cuts or self._standing(block) is not standing:
                    break
                blocks.append(block)
            place, end = len(runs), num_before + len(blocks)
            runs.append(_Run(blocks, scope, num_before, standing, parent_run))
            stack += ((each, scope, end, place) for each in after[id(blocks[-1])])
        return runs

    def _standing(self, block: CachedBlock) -> Standing:
        if block.holders:
            return Standing.PINNED if block.is_pinned else Standing.IN_CONTEXT
        return Standing.IDLE if self._cache.is_free(block) else Standing.IN_USE

    def _num_bytes(self, run: _Run) -> int:
        partition, total = self._cache.shared.partition, 0.0
        for block in run.blocks:
            for copy in block.copies:
                for group, held in enumerate(copy.held()):
                    size = self._block_bytes[group]
                    total += size * (held.block_id != NO_BLOCK)
                    if held.encoded_id != NO_BLOCK:
                        total += size * partition.encoded_worth(block.codec, group)
        return round(total)


_STAYS = {
    Standing.IDLE: "",
    Standing.IN_USE: "in_use",
    Standing.IN_CONTEXT: "in_contexts",
    Standing.PINNED: "in_contexts",
}
"""Field of `CachePurged` that counts what is never given up."""


def _wanted(runs: Sequence[_Run], wanted: CachePurge) -> list[bool]:
    """For each run whether it is to be given up: with an entry, all that follows it is."""
    named: list[bool] = []
    for run in runs:
        is_after = run.parent is not None and named[run.parent]
        is_any = not wanted.entries
        named.append(is_any or is_after or run.blocks[0].label in wanted.entries)
    namespace = wanted.cache_namespace
    return [
        is_named and namespace in (None, run.scope.namespace)
        for is_named, run in zip(named, runs, strict=True)
    ]


def _num_before(block: CachedBlock) -> int:
    """Blocks before one of its prompt."""
    count, at = 0, block.parent
    while at is not None:
        count, at = count + 1, at.parent
    return count
