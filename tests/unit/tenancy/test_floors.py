"""Floors fit in what engines have, also where several processes set them at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from kvcluster.errors import InvalidField
from kvcluster.tenancy.limits import Partitions, Tier, TierPartition
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import Tenant
from kvcluster.types import TenantId
from tests.unit.tenancy.acting import BLUE, RED, act, tenant

TIERS = {Tier.GPU: 100}


def with_floor(found: Tenant, floor: int) -> Tenant:
    return msgspec.structs.replace(
        found, partitions=Partitions(gpu=TierPartition(floor_bytes=floor))
    )


def floors(store: SqliteTenantStore) -> list[int]:
    found = [found.partitions.gpu.floor_bytes for found in store.tenants_after("", 100)]
    return [floor for floor in found if floor]


def test_routers_that_set_floors_at_once_set_no_more_than_there_is(
    store: SqliteTenantStore, path: Path
) -> None:
    """Each has a connection of its own, and has asked the engines before any of them writes."""
    names = [TenantId(f"tenant-{number}") for number in range(6)]
    for name in names:
        store.create(tenant(name), act())
    together = threading.Barrier(len(names))

    def set_floor(name: TenantId) -> bool:
        own = SqliteTenantStore(path)
        try:
            together.wait()
            own.change(name, act(), lambda found: with_floor(found, 40), tiers=TIERS)
        except InvalidField:
            return False
        finally:
            own.close()
        return True

    with ThreadPoolExecutor(len(names)) as pool:
        were_set = list(pool.map(set_floor, names))

    assert sum(were_set) == 2
    assert sum(floors(store)) == 80


def test_a_refused_floor_leaves_nothing_behind(store: SqliteTenantStore) -> None:
    store.create(with_floor(tenant(), 70), act(), tiers=TIERS)
    events = store.events_after(None, 0, 100)

    with pytest.raises(InvalidField, match="want at most 30: the tier has 100 bytes"):
        store.create(with_floor(tenant(BLUE), 31), act(), tiers=TIERS)

    assert floors(store) == [70]
    assert store.events_after(None, 0, 100) == events


def test_a_tenant_comes_back_only_where_its_floor_still_fits(store: SqliteTenantStore) -> None:
    store.create(with_floor(tenant(), 70), act(), tiers=TIERS)
    store.delete(RED, act(), purge_after_s=60)
    store.create(with_floor(tenant(BLUE), 70), act(), tiers=TIERS)

    with pytest.raises(InvalidField, match="want at most 30"):
        store.undelete(RED, act(), tiers=TIERS)

    store.change(BLUE, act(), lambda found: with_floor(found, 30), tiers=TIERS)
    assert store.undelete(RED, act(), tiers=TIERS).partitions.gpu.floor_bytes == 70


def test_what_engines_have_is_not_asked_of_a_floor_that_is_lowered(
    store: SqliteTenantStore,
) -> None:
    store.create(with_floor(tenant(), 70), act())

    lowered = store.change(RED, act(), lambda found: with_floor(found, 60), tiers={Tier.GPU: 50})

    assert lowered.partitions.gpu.floor_bytes == 60
