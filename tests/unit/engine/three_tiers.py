"""A fake cluster with a tier in the host's memory and one on disk, driven by hand: what tenants
have of both, shares and data keys as routers tell them, restarts, and books."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Coroutine, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.spill_host import SpillHost
from kvcluster.cache.tier import TierLedger, TierShare
from kvcluster.engine.context import Context, SealedCopy
from kvcluster.engine.context_stores import ContextStores
from kvcluster.engine.store_parts import SealedTier, StoreParts
from kvcluster.engine.tenant_keys import TenantKeys
from kvcluster.tenancy.limits import Partitions, Tier
from kvcluster.tenancy.shares import TenantShare, TenantShares
from kvcluster.types import TenantId
from tests.fake_engine import FakeCluster
from tests.fake_ranks import FakeRanks, InlineExecutor
from tests.unit.engine.test_published_prefixes import cluster

TENANTS = tuple(map(TenantId, ("red", "blue", "green")))


class Sizes(NamedTuple):
    """Of a cluster: blocks of each rank, and bytes of the tiers off them."""

    num_blocks: int
    num_ranks: int
    host_bytes: int
    disk_bytes: int


class ThreeTiers:
    """Mutable. The event loop stands still between calls."""

    def open(self, sizes: Sizes, host_shares: Mapping[TenantId, TierShare]) -> None:
        where = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = Path(tempfile.mkdtemp(dir=where))
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(InlineExecutor())
        self.sizes = sizes
        self.keys = dict.fromkeys(TENANTS, 1)
        """The version of each tenant's only data key."""
        self.shares: dict[TenantId, dict[Tier, TierShare]] = {tenant: {} for tenant in TENANTS}
        for tenant, share in host_shares.items():
            self.shares[tenant][Tier.HOST] = share
        self.has_failed = False
        """What was begun may not have been ended."""
        self.revision = self.starts = 0
        self.run(self.start())

    def close(self) -> None:
        """Also after a fault."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        for sealed in self.tiers.values():
            sealed.tier.close()
        self.loop.close()
        shutil.rmtree(self.folder)

    async def start(self) -> None:
        """A cluster that knows what is on disk."""
        num_blocks, num_ranks, host_bytes, disk_bytes = self.sizes
        self.starts += 1
        self.fake: FakeCluster = cluster(
            num_blocks=num_blocks, num_ranks=num_ranks, first_id=1_000_000 * self.starts
        )
        self.ranks = FakeRanks(self.fake.ring)
        memory = self.folder / f"host-{self.starts}"
        memory.mkdir()
        self.tiers = {
            Tier.HOST: SealedTier(SpillHost(memory), TierLedger([host_bytes], unit_bytes=[1])),
            Tier.DISK: SealedTier(
                SpillDisk(self.folder / "disk", self.folder / "index"),
                TierLedger([disk_bytes], unit_bytes=[1]),
            ),
        }
        self.stores = ContextStores(
            self.fake.engine,
            StoreParts(
                TenantKeys(),
                self.ranks,
                host=self.tiers[Tier.HOST],
                disk=self.tiers[Tier.DISK],
            ),
            wake=lambda: None,
        )
        self.stores.start()
        await self.push()

    async def push(self) -> None:
        """What routers tell."""
        self.revision += 1
        for tier, sealed in self.tiers.items():
            share = {tenant: self.shares[tenant].get(tier, TierShare()) for tenant in TENANTS}
            sealed.ledger.apply(share)
        told = tuple(
            TenantShare(
                tenant=tenant,
                partitions=Partitions(),
                tenant_uid=f"uid of {tenant}",
                data_keys={version: bytes([version % 256, *tenant.encode()]).ljust(32)},
            )
            for tenant, version in self.keys.items()
        )
        await self.driven(self.stores.apply(TenantShares(revision=self.revision, shares=told)))

    def check_floors(self, tenant: TenantId, before: dict[TenantId, int]) -> None:
        """Whoever made room in the host for this tenant kept what its floor covers."""
        for other, used in self.host_use().items():
            share = self.shares[other].get(Tier.HOST, TierShare())
            floor = min(share.floor_bytes, share.limit_bytes)
            assert other == tenant or used >= min(before[other], floor), "a floor was broken"

    def host_use(self) -> dict[TenantId, int]:
        ledger = self.tiers[Tier.HOST].ledger
        return {tenant: ledger.use(tenant).used_bytes for tenant in TENANTS}

    def on_host(self) -> list[Context]:
        return [each for tenant in TENANTS for each in self.of(tenant) if each.is_on_host]

    def of(self, tenant: TenantId) -> list[Context]:
        return self.fake.engine.contexts.of(tenant)

    def num_bytes_in(self, tier: Tier) -> int:
        where = f"host-{self.starts}" if tier is Tier.HOST else "disk"
        files = (self.folder / where).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def run(self, body: Coroutine[Any, Any, None]) -> None:
        async def to_the_end() -> None:
            await body
            await self.quiet()

        self.has_failed = True
        self.loop.run_until_complete(to_the_end())
        self.has_failed = False

    async def driven(self, work: Awaitable[None]) -> None:
        """Wait for what the ring has a part in."""
        task = asyncio.ensure_future(work)
        while not task.done():
            self.fake.run()
            await asyncio.sleep(0)
        await task

    async def quiet(self) -> None:
        """Return when nothing runs, is written, moved or destroyed any more."""
        for _ in range(10_000):
            self.fake.run()
            await asyncio.sleep(0)
            if not self.stores._tasks:
                return
            is_idle = not self.stores._unsaved and self.stores._saving is None
            if is_idle and len(self.stores._tasks) == 1:
                return
        raise AssertionError("something never ends")

    def check_books(self) -> None:
        """Assert that each tier's books are exact: what tenants hold of it and what is free is all
        of it, and it is what lies there."""
        self.fake.check_books()
        for tier, sealed in self.tiers.items():
            sealed.ledger.check()
            for tenant in TENANTS:
                num_bytes = sum(copy_in(tier, each).num_bytes for each in self.of(tenant))
                assert sealed.ledger.use(tenant).used_bytes == num_bytes
                assert sealed.tier.used_bytes(tenant) == num_bytes
            used = sum(sum(sealed.ledger.used(tenant)) for tenant in sealed.ledger.tenants)
            assert used == self.num_bytes_in(tier), "every byte there is counted"


def copy_in(tier: Tier, context: Context) -> SealedCopy:
    return context.host if tier is Tier.HOST else context.disk
