"""Nobody is given what another tenant had computed, whatever tier it lies in, and every byte of
every tier is counted: long runs of `isolation_machine`, and for each path a fault that it finds."""

from collections.abc import Callable
from typing import Any

import pytest

from kvcluster.cache.partitions import CachePartitions
from kvcluster.cache.prefix_cache import CachedBlock, PrefixCache
from kvcluster.cache.spill import SealedContext, SpillTicket
from kvcluster.cache.spill_folder import SpillFolder
from kvcluster.cache.tier import TierLedger
from kvcluster.engine.context import Context
from kvcluster.engine.context_files import ContextFiles
from kvcluster.engine.context_stores import ContextStores
from kvcluster.engine.contexts import Contexts
from kvcluster.engine.host_room import HostRoom
from kvcluster.engine.prefixes import Prefixes
from kvcluster.engine.restored_blocks import RestoredBlocks
from kvcluster.engine.tenant_keys import TenantKeys
from kvcluster.types import PUBLISHED, TenantId
from tests.unit.engine.isolation_machine import CONTROLS, counted
from tests.unit.engine.three_tiers import TENANTS

Fault = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.timeout(600)
def test_nobody_is_given_what_another_tenant_had_computed() -> None:
    # Which paths a run takes is chance: one that missed some is not the proof, and a longer one is.
    for operations in (10_000, 20_000, 40_000):
        seen = counted(operations)
        if all(seen[name] for name in CONTROLS):
            break

    assert seen["operations"] >= 10_000
    assert {name for name in CONTROLS if seen[name]} == CONTROLS


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_nobody_is_in_a_hundred_thousand_operations() -> None:
    seen = counted(100_000)

    assert seen["operations"] >= 100_000
    assert {name for name in CONTROLS if seen[name]} == CONTROLS


def lookup_in_a_shared_cache(patch: pytest.MonkeyPatch) -> None:
    """One partition and one secret for everybody."""
    cache, of = Prefixes.cache, CachePartitions.of

    def one(tenant: TenantId) -> TenantId:
        return tenant if tenant == PUBLISHED else TENANTS[0]

    patch.setattr(Prefixes, "cache", lambda self, tenant: cache(self, one(tenant)))
    patch.setattr(CachePartitions, "of", lambda self, tenant: of(self, one(tenant)))
    patch.setattr("kvcluster.engine.prefix_keys.blake2b", lambda _tenant, **_: _Constant())


def insert_that_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    """The second block of a request is free."""
    take = TierLedger.take

    def taken(self: TierLedger, tenant: TenantId, group: int, count: int) -> bool:
        is_block = self._chunk > 1 and count == 1 and self.used(tenant)[group] == 1
        return is_block or take(self, tenant, group, count)

    patch.setattr(TierLedger, "take", taken)


def evict_that_gives_nothing_back(patch: pytest.MonkeyPatch) -> None:
    drop = PrefixCache._drop

    def dropped(self: PrefixCache, block: CachedBlock) -> None:
        for copy in block.copies:
            self.shared.retain(block.codec, copy)
        drop(self, block)

    patch.setattr(PrefixCache, "_drop", dropped)


def fork_of_another_length(patch: pytest.MonkeyPatch) -> None:
    fork = Contexts.fork
    patch.setattr(Contexts, "fork", lambda self, parent, request, _: fork(self, parent, request, 0))


def name_of_any_tenant(patch: pytest.MonkeyPatch) -> None:
    """Contexts are found whoever asks."""

    find = Contexts.find

    def found(self: Contexts, tenant: TenantId, context_id: str) -> Context:
        same = (each for each in self.all() if each.id == context_id)
        return next(same, None) or find(self, tenant, context_id)

    patch.setattr(Contexts, "find", found)


def offload_that_is_charged_less(patch: pytest.MonkeyPatch) -> None:
    """A byte of each context is nobody's."""
    replace = ContextFiles._replace

    async def replaced(self: ContextFiles, context: Context, *args: Any, **named: Any) -> None:
        await replace(self, context, *args, **named)
        self._ledger.give_back(context.tenant, 0, 1)

    patch.setattr(ContextFiles, "_replace", replaced)


def restore_of_another_tenants(patch: pytest.MonkeyPatch) -> None:
    """Whatever is in the tier under the same name, with the key that it needs."""
    read = ContextFiles.read

    async def confused(self: ContextFiles, context: Context, blocks: RestoredBlocks) -> None:
        async def ticket(sealed: SealedContext, _ring: object) -> SpillTicket:
            same = [each for each in self.listed() if each.owner.context == context.id]
            taken = next((each for each in same if each.owner != sealed.owner), sealed)
            ring = self._keys.of(taken.owner.tenant)
            assert ring is not None
            return self._tier.open(taken.owner, taken.spill, ring.keys)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "ticket", ticket)
            await read(self, context, blocks)

    patch.setattr(ContextFiles, "read", confused)


def move_that_leaves_its_files(patch: pytest.MonkeyPatch) -> None:
    """What has left the host is still there, and charged to nobody."""
    remove = SpillFolder._remove_files
    patch.setattr(
        SpillFolder,
        "_remove_files",
        lambda self, spill: None if "host" in self._folder.name else remove(self, spill),
    )


def move_that_is_charged_twice(patch: pytest.MonkeyPatch) -> None:
    """What has moved to disk counts in the host still."""

    async def drop(self: ContextFiles, context: Context) -> None:
        copy = self.of(context)
        if copy.spill is not None:
            self._tier.delete(copy.spill.owner, copy.spill.spill)
            copy.spill = None

    patch.setattr(ContextFiles, "drop", drop)


def room_for_one_that_is_anothers(patch: pytest.MonkeyPatch) -> None:
    """Whoever was not used for longest leaves the host, whatever floor it is under."""

    def following(self: HostRoom, *_: object) -> Context | None:
        resting = [each for tenant in TENANTS for each in self.resting(tenant)]
        return min(resting, key=lambda each: each.last_access_time_s, default=None)

    patch.setattr(HostRoom, "_next", following)


def delete_that_forgets_the_disk(patch: pytest.MonkeyPatch) -> None:
    async def drop(self: ContextStores, context: Context) -> None:
        if self._host is not None:
            await self._host.drop(context)
        context.disk.is_clear = True
        self._contexts.forget_deleted(context)

    patch.setattr(ContextStores, "_drop", drop)


def delete_that_keeps_the_blocks(patch: pytest.MonkeyPatch) -> None:
    """Of the deleted context, on the GPUs."""
    patch.setattr(Prefixes, "forget", lambda *_: [])
    patch.setattr(PrefixCache, "let_go", lambda *_: None)


def key_that_outlives_its_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TenantKeys, "are_destroyed", lambda *_: False)


def restart_that_trusts_the_host(patch: pytest.MonkeyPatch) -> None:
    """What is in memory alone is said to be on disk."""
    patch.setattr(Context, "is_on_disk", Context.is_on_host)


FAULTS: tuple[Fault, ...] = (
    lookup_in_a_shared_cache,
    insert_that_is_not_counted,
    evict_that_gives_nothing_back,
    fork_of_another_length,
    name_of_any_tenant,
    offload_that_is_charged_less,
    restore_of_another_tenants,
    move_that_leaves_its_files,
    move_that_is_charged_twice,
    room_for_one_that_is_anothers,
    delete_that_forgets_the_disk,
    delete_that_keeps_the_blocks,
    key_that_outlives_its_end,
    restart_that_trusts_the_host,
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_finds_a_fault_of_each_path(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)

    with pytest.raises((AssertionError, ValueError)):
        counted(3_000, shrinks=False)


class _Constant:
    def digest(self) -> bytes:
        return bytes(32)
