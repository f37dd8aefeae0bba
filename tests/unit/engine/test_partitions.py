"""Floors, limits and borrowed memory in a running engine (block size 4, pages of 8 blocks)."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from kvcluster.cache.partition import Partition
from kvcluster.cache.tier import TierShare
from kvcluster.config import EngineConfig
from kvcluster.engine.api import FinishReason
from kvcluster.engine.plan import StepPlan
from kvcluster.errors import QuotaExceeded
from kvcluster.policy import Menu, Method, PlugPoint
from kvcluster.tenancy.limits import NO_LIMITS, UNLIMITED, Partitions, TierPartition
from kvcluster.tenancy.shares import TenantShare, TenantShares
from kvcluster.types import BlockId, GenerationId, TenantId
from tests.fake_engine import FakeCluster, model_spec
from tests.unit.engine.serving import Served

RED, BLUE = TenantId("red"), TenantId("blue")
BLOCK_BYTES = 4 * 4 * (4 + 4)
"""Tokens, bytes of a number, numbers of K and V."""
HALF = Menu((Method(plug_point=PlugPoint.CODEC, name="half", meaning=""),))


def cluster(num_blocks: int = 32, **fields: object) -> FakeCluster:
    """One rank with so many blocks."""
    config = EngineConfig(prefill_chunk_tokens=64, shard_min_tokens=1000)
    return FakeCluster(
        spec=model_spec(eos_token_ids=()),
        config=config,
        num_ranks=1,
        num_blocks=num_blocks,
        menu=HALF,
        encoded_per_page={"half": [16]},
        **fields,  # type: ignore[arg-type]
    )


def share(
    fake: FakeCluster,
    *,
    floors: Mapping[TenantId, int] | None = None,
    limits: Mapping[TenantId, int] | None = None,
) -> None:
    """In blocks."""
    limits, floors = limits or {}, floors or {}
    fake.partitions.apply(
        {
            tenant: TierShare(
                floor_bytes=floors.get(tenant, 0) * BLOCK_BYTES,
                limit_bytes=limits[tenant] * BLOCK_BYTES if tenant in limits else UNLIMITED,
            )
            for tenant in {*floors, *limits}
        }
    )


def send(
    fake: FakeCluster, tenant: TenantId, num_tokens: int, outputs: int = 1, **fields: object
) -> GenerationId:
    return fake.submit([1] * num_tokens, outputs, tenant=tenant, **fields)


def used(fake: FakeCluster, tenant: TenantId) -> int:
    return fake.partitions.of(tenant).num_used


def running(fake: FakeCluster) -> list[TenantId]:
    return [request.spec.tenant for request in fake.engine._scheduler.running]


def test_a_floor_is_free_for_its_tenant_though_another_wants_everything() -> None:
    fake = cluster()
    share(fake, floors={BLUE: 16})
    for _ in range(8):
        send(fake, RED, 12, 8)
    for _ in range(6):
        fake.step()
        assert used(fake, RED) <= 16

    blue = send(fake, BLUE, 60, 4)
    for _ in range(4):
        fake.step()

    assert used(fake, BLUE) >= 15
    fake.run()
    assert fake.reason(blue) is FinishReason.LENGTH


def test_a_request_that_the_floors_of_others_leave_no_room_for_is_refused_at_once() -> None:
    fake = cluster()
    share(fake, floors={BLUE: 16})

    with pytest.raises(QuotaExceeded) as refused:
        send(fake, RED, 80)

    assert refused.value.metadata["needed_blocks"] == "20"
    assert int(refused.value.metadata["limit_blocks"]) <= 16
    assert fake.num_leaked == 0


def test_a_request_over_the_limit_is_refused_with_what_it_needs_and_may_have() -> None:
    fake = cluster()
    share(fake, limits={RED: 10})

    with pytest.raises(QuotaExceeded) as refused:
        send(fake, RED, 44)

    assert refused.value.metadata["needed_blocks"] == "11"
    assert refused.value.metadata["limit_blocks"] == "10"
    assert send(fake, BLUE, 44)


def test_within_its_limit_a_tenant_waits_for_itself_and_holds_nobody_up() -> None:
    fake = cluster()
    share(fake, limits={RED: 12})
    first, second = send(fake, RED, 32, 4), send(fake, RED, 32, 4)
    fake.step()
    other = send(fake, BLUE, 32, 4)
    fake.step()

    assert running(fake) == [RED, BLUE]
    fake.run()
    for generation in (first, second, other):
        assert fake.reason(generation) is FinishReason.LENGTH


def test_who_borrows_gives_way_when_a_floor_is_raised() -> None:
    fake = cluster()
    red = send(fake, RED, 100, 20)
    fake.step()
    fake.step()
    share(fake, floors={BLUE: 24})
    blue = send(fake, BLUE, 64, 12)

    fake.run()

    assert fake.reason(blue) is FinishReason.LENGTH
    # What floors leave is too little for it now, and it is told so.
    assert fake.finished(red).error_kind == "QuotaExceeded"
    assert fake.num_leaked == 0


def test_a_running_request_within_its_floor_never_makes_room_for_others() -> None:
    """Red's are older, so they would be preempted last by age alone."""
    fake = cluster()
    share(fake, floors={BLUE: 16})
    for _ in range(3):
        send(fake, RED, 16, 20)
    fake.step()
    blue = send(fake, BLUE, 40, 24)
    fake.step()
    while not fake.engine.find(blue).log.is_finished:
        assert BLUE in running(fake)
        fake.step()

    assert fake.reason(blue) is FinishReason.LENGTH


def test_between_tenants_priority_takes_nobodys_memory() -> None:
    fake = cluster(num_blocks=16)
    limits = msgspec.structs.replace(NO_LIMITS, weight=1)
    red = send(fake, RED, 20, 40, limits=limits)
    fake.step()
    send(fake, BLUE, 20, 40, limits=limits, priority=50)

    fake.step()
    while not fake.engine.find(red).log.is_finished:
        assert RED in running(fake), "it was there first"
        fake.step()

    assert fake.reason(red) is FinishReason.LENGTH


def test_pages_of_a_floor_are_whole_though_others_take_single_blocks() -> None:
    """Exact requests of red lie anywhere; blue's codec needs pages of 8 free blocks."""
    fake = cluster(num_blocks=64)
    share(fake, floors={BLUE: 32})
    for _ in range(20):
        send(fake, RED, 4, 3)
        fake.step()

    blue = send(fake, BLUE, 80, 4, policy="half")
    fake.step()

    assert used(fake, BLUE) > 0
    fake.run()
    assert fake.reason(blue) is FinishReason.LENGTH


@dataclass
class KeptBlocks:
    """What a tenant's requests left behind, one block at a time, the oldest first."""

    fake: FakeCluster
    tenant: TenantId
    block_ids: list[BlockId] = field(default_factory=list)

    def keep(self, count: int) -> None:
        partition: Partition = self.fake.partitions.of(self.tenant)
        partition.plug(self)
        for _ in range(count):
            assert self.fake.partitions.ledger.take(self.tenant, 0, 1)
            block_id = self.fake.pools[0][0].allocate(None)
            assert block_id is not None
            self.block_ids.append(block_id)

    def idle_units(self) -> Sequence[int]:
        return [len(self.block_ids)]

    def evict(self, group: int, count: int) -> None:
        for _ in range(count):
            self.fake.pools[0][group].release(self.block_ids.pop(0))
        self.fake.partitions.ledger.give_back(self.tenant, group, count)


def test_cached_blocks_make_room_and_a_floor_keeps_what_it_covers() -> None:
    fake = cluster()
    share(fake, floors={BLUE: 8})
    kept = KeptBlocks(fake, BLUE)
    kept.keep(20)

    red = send(fake, RED, 64, 1)
    fake.step()

    # 12 were free, and 4 of the 12 that blue had borrowed were wanted.
    assert len(kept.block_ids) == 16
    assert fake.reason(red) is FinishReason.LENGTH
    with pytest.raises(QuotaExceeded):
        send(fake, RED, 104)
    fake.partitions.check()


def test_who_keeps_most_for_its_weight_gives_first() -> None:
    fake = cluster(num_blocks=64)
    kept = [KeptBlocks(fake, tenant) for tenant in (RED, BLUE)]
    kept[0].keep(40)
    kept[1].keep(16)

    send(fake, TenantId("green"), 124)
    fake.run()

    # 31 blocks were wanted and 8 free: 23 came from red, then it kept as much as blue.
    assert (len(kept[0].block_ids), len(kept[1].block_ids)) == (17, 16)


def test_a_lowered_limit_evicts_what_is_kept_above_it_at_once() -> None:
    fake = cluster()
    kept = KeptBlocks(fake, RED)
    kept.keep(20)

    share(fake, limits={RED: 5})

    assert len(kept.block_ids) == 5


def pushed(revision: int, floor: int) -> TenantShares:
    gpu = TierPartition(floor_bytes=floor * BLOCK_BYTES)
    one = TenantShare(tenant=BLUE, partitions=Partitions(gpu=gpu))
    return TenantShares(revision=revision, shares=(one,))


async def floor_of_blue(served: Served) -> int:
    load = await served.service.tenant_load(BLUE, NO_LIMITS)
    return load.tiers["gpu"].floor_bytes // BLOCK_BYTES


async def test_pushed_shares_hold_once_the_ring_serves_and_old_ones_change_nothing(
    served: Served,
) -> None:
    await served.service.apply_shares(pushed(5, floor=8))
    before = await floor_of_blue(served)
    served.service.mark_ready()
    ready = await floor_of_blue(served)
    await served.service.apply_shares(pushed(4, floor=2))

    assert (before, ready, await floor_of_blue(served)) == (0, 8, 8)


async def test_usage_tells_what_is_used_and_what_of_it_is_borrowed(served: Served) -> None:
    served.service.mark_ready()
    await served.service.apply_shares(pushed(1, floor=3))
    served.gate.clear()
    await served.start(list(range(1, 9)), 40, tenant=BLUE)
    while not served.fake.partitions.of(BLUE).num_used:
        await asyncio.sleep(0)

    load = await served.service.tenant_load(BLUE, NO_LIMITS)

    gpu = load.tiers["gpu"]
    assert gpu.used_bytes == served.fake.partitions.of(BLUE).num_used * BLOCK_BYTES > 0
    assert gpu.borrowed_bytes == max(0, gpu.used_bytes - gpu.floor_bytes)
    assert (await served.service.status()).tier_bytes == {"gpu": 64 * BLOCK_BYTES}


def plan_of(fake: FakeCluster) -> StepPlan:
    plan = fake.step()
    assert plan is not None
    return plan


def test_tenants_start_in_one_step_each_within_what_it_may_have() -> None:
    fake = cluster()
    share(fake, limits={RED: 5, BLUE: 12})
    send(fake, RED, 12, 2)
    send(fake, RED, 12, 2)
    send(fake, BLUE, 24, 2)

    starts = plan_of(fake).started

    assert len(starts) == 2
    assert sorted(running(fake)) == [BLUE, RED]
