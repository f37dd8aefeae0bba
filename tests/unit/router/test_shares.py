"""Shares of cache memory, from the admin port to the engines and back as usage."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc import aio

from kvcluster.engine.api import TierLoad
from kvcluster.errors import RankLost
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.limits import Partitions, TierPartition
from kvcluster.types import TenantId
from tests.unit.router.administering import Administered, administered
from tests.unit.router.fake_backend import FakeBackend

RED = TenantId("red")


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def admin(tmp_path: Path, backend: FakeBackend) -> AsyncIterator[Administered]:
    async with administered(tmp_path / "tenants.sqlite", backend) as served:
        yield served


TIERS = pytest.mark.parametrize("tier", ["gpu", "host", "disk"])


async def set_gpu(admin: Administered, tenant: str, *, floor: int, limit: int) -> pb.Tenant:
    return await set_share(admin, tenant, "gpu", floor=floor, limit=limit)


async def set_share(
    admin: Administered, tenant: str, tier: str, *, floor: int, limit: int
) -> pb.Tenant:
    partitions = pb.Partitions(**{tier: pb.TierPartition(floor_bytes=floor, limit_bytes=limit)})
    changed = pb.Tenant(name=f"tenants/{tenant}", partitions=partitions)
    request = pb.UpdateTenantRequest(tenant=changed)
    return await admin.stub.UpdateTenant(request, metadata=admin.operator)


async def test_when_a_share_is_changed_the_engines_have_it_before_the_admin_hears(
    admin: Administered, backend: FakeBackend
) -> None:
    await admin.create("red", weight=5)
    created = backend.shares

    await set_gpu(admin, "red", floor=100, limit=900)

    (first,) = created.shares
    assert (first.tenant, first.partitions, first.weight) == (RED, Partitions(), 5)
    assert backend.shares.revision > created.revision
    gpu = TierPartition(floor_bytes=100, limit_bytes=900)
    (share,) = backend.shares.shares
    assert (share.partitions, share.weight) == (Partitions(gpu=gpu), 5)


async def test_engines_have_a_tenants_data_keys_and_lose_those_that_are_erased(
    admin: Administered, backend: FakeBackend
) -> None:
    tenant = await admin.create("red")
    (created,) = backend.shares.shares
    for erases in (False, True):
        await admin.stub.RotateTenantKey(
            pb.RotateTenantKeyRequest(name="tenants/red", crypto_erase=erases),
            metadata=admin.operator,
        )
        (share,) = backend.shares.shares
        assert share.data_keys is not None
        assert set(share.data_keys) == ({3} if erases else {1, 2})
    await admin.stub.DeleteTenant(
        pb.DeleteTenantRequest(name="tenants/red"), metadata=admin.operator
    )

    assert created.data_keys is not None
    assert len(created.data_keys[1]) == 32
    assert repr(created.data_keys[1]) not in repr(created)
    assert created.tenant_uid == tenant.uid
    assert backend.shares.deleted == ((RED, tenant.uid),)


async def test_a_deleted_tenant_has_no_share(admin: Administered, backend: FakeBackend) -> None:
    await admin.create("red")
    await admin.stub.DeleteTenant(
        pb.DeleteTenantRequest(name="tenants/red"), metadata=admin.operator
    )

    assert backend.shares.shares == ()


@TIERS
async def test_floors_that_do_not_fit_together_are_refused_with_what_is_left(
    tier: str, admin: Administered, backend: FakeBackend
) -> None:
    backend.tier_bytes = {"gpu": 5, "host": 5, "disk": 5, tier: 1000}
    await admin.create("red")
    await admin.create("blue")
    await set_share(admin, "red", tier, floor=700, limit=1000)

    with pytest.raises(aio.AioRpcError) as refused:
        await set_share(admin, "blue", tier, floor=301, limit=1000)

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"partitions.{tier}.floor_bytes: want at most 300" in (refused.value.details() or "")
    kept = await set_share(admin, "blue", tier, floor=300, limit=1000)
    assert getattr(kept.partitions, tier).floor_bytes == 300


@TIERS
async def test_a_tenant_is_not_created_or_undeleted_with_a_floor_that_does_not_fit(
    tier: str, admin: Administered, backend: FakeBackend
) -> None:
    backend.tier_bytes = {tier: 1000}
    partitions = pb.Partitions(**{tier: pb.TierPartition(floor_bytes=600)})
    create = [
        pb.CreateTenantRequest(tenant_id=name, tenant=pb.Tenant(partitions=partitions))
        for name in ("red", "blue")
    ]
    red = {"name": "tenants/red"}
    await admin.stub.CreateTenant(create[0], metadata=admin.operator)
    with pytest.raises(aio.AioRpcError, match="want at most 400"):
        await admin.stub.CreateTenant(create[1], metadata=admin.operator)
    await admin.stub.DeleteTenant(pb.DeleteTenantRequest(**red), metadata=admin.operator)
    await admin.stub.CreateTenant(create[1], metadata=admin.operator)

    with pytest.raises(aio.AioRpcError, match="want at most 400"):
        await admin.stub.UndeleteTenant(pb.UndeleteTenantRequest(**red), metadata=admin.operator)

    assert (await admin.get("red")).state == pb.Tenant.STATE_DELETED


async def test_a_tier_that_the_engines_do_not_have_keeps_no_floor(
    admin: Administered, backend: FakeBackend
) -> None:
    backend.tier_bytes = {"gpu": 1000}
    await admin.create("red")

    with pytest.raises(aio.AioRpcError, match="the tier has 0 bytes"):
        await set_share(admin, "red", "host", floor=1, limit=1000)


async def test_floors_that_are_set_at_once_are_never_more_than_there_is(
    admin: Administered, backend: FakeBackend
) -> None:
    backend.tier_bytes = {"gpu": 1000}
    names = ("red", "blue", "green")
    for name in names:
        await admin.create(name)
    setting = (set_gpu(admin, name, floor=400, limit=1000) for name in names)
    answers = await asyncio.gather(*setting, return_exceptions=True)

    assert sum(isinstance(answer, aio.AioRpcError) for answer in answers) == 1


async def test_a_floor_is_lowered_though_the_floors_do_not_fit_any_more(
    admin: Administered, backend: FakeBackend
) -> None:
    await admin.create("red")
    await set_gpu(admin, "red", floor=700, limit=1000)
    backend.tier_bytes = {"gpu": 500}

    lowered = await set_gpu(admin, "red", floor=600, limit=1000)

    assert lowered.partitions.gpu.floor_bytes == 600


async def test_an_engine_that_does_not_answer_holds_no_admin_up_and_gets_the_shares_later(
    admin: Administered, backend: FakeBackend
) -> None:
    backend.status_failure = RankLost("rank 0 was lost")
    await admin.create("red")
    before = backend.shares

    backend.status_failure = None
    await admin.create("blue")

    assert before.shares == ()
    assert [share.tenant for share in backend.shares.shares] == [RED, "blue"]


async def test_usage_tells_floor_limit_used_and_borrowed_of_every_tier(
    admin: Administered, backend: FakeBackend
) -> None:
    backend.tiers = {"gpu": TierLoad(used_bytes=150, borrowed_bytes=50, cached_bytes=20)}
    await admin.create("red")
    await set_gpu(admin, "red", floor=100, limit=900)

    usage = await admin.stub.GetTenantUsage(
        pb.GetTenantUsageRequest(name="tenants/red/usage"), metadata=admin.operator
    )

    assert usage.gpu == pb.TierUsage(
        floor_bytes=100, limit_bytes=900, used_bytes=150, borrowed_bytes=50, cached_bytes=20
    )
    # Nothing is kept there, and nothing limits it.
    assert usage.disk == pb.TierUsage()
    assert not usage.disk.HasField("limit_bytes")
