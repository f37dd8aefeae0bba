"""What tests of contexts in the host's memory share."""

import os
import shutil
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvcluster.config import ClusterConfig, SpillConfig, TenancyConfig
from kvcluster.engine.api import TokenChunk
from kvcluster.engine.context_api import ContextRequest
from kvcluster.engine.service import EngineService
from kvcluster.tenancy.limits import UNLIMITED, Partitions, Tier, TierPartition
from kvcluster.tenancy.shares import TenantShare, TenantShares
from kvcluster.types import DEFAULT_TENANT, TenantId
from tests.distributed.stored_contexts import KEY
from tests.distributed.test_contexts import BOOK, config, uploaded
from tests.served_model import served_model
from tests.thread_executor import running_engine

MEMORY = Path("/dev/shm")
ROOMY = 64 * 1024 * 1024

needs_memory = pytest.mark.skipif(not MEMORY.is_dir(), reason="this system has no /dev/shm")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    made = MEMORY / f"test-{os.getpid()}-{tmp_path.name}"
    made.mkdir()
    yield made
    shutil.rmtree(made)


def host_config(
    memory: Path, folder: Path | None = None, *, num_ranks: int = 2, capacity: int = ROOMY
) -> ClusterConfig:
    spill = SpillConfig(
        folder="" if folder is None else str(folder),
        host_folder=str(memory),
        host_capacity_bytes=capacity,
    )
    return replace(config(num_ranks), spill=spill)


@asynccontextmanager
async def hosting(
    memory: Path, folder: Path | None = None, **options: int
) -> AsyncIterator[EngineService]:
    settings = host_config(memory, folder, **options)
    async with running_engine(served_model("llama"), settings) as (service, _):
        yield service


def in_memory(memory: Path) -> list[Path]:
    return [path for path in memory.rglob("*.sealed") if path.is_file()]


def check_books(service: EngineService, memory: Path) -> None:
    """What tenants are charged in the host's memory is what lies there."""
    ledger = service._parts.stores.host.ledger
    ledger.check()
    charged = sum(ledger.use(tenant).used_bytes for tenant in ledger.tenants)
    assert charged == sum(file.stat().st_size for file in in_memory(memory))


def give_up(service: EngineService, tenant: TenantId = DEFAULT_TENANT) -> None:
    """Others have wanted the ranks' memory."""
    service._engine.prefixes.cache(tenant).evict(0, 1 << 30)


async def one_context(memory: Path, policy: str = "") -> int:
    """Bytes that a context may take while it is written, of which it is charged nearly all."""
    async with hosting(memory) as service:
        await uploaded(service, BOOK, policy)
        await service._stores.wait_idle()
        return service._stores._host.most_bytes(service._contexts.find(DEFAULT_TENANT, "book"))


def shares(revision: int, *tenants: TenantShare) -> TenantShares:
    return TenantShares(revision=revision, shares=tenants)


def share(
    tenant: TenantId,
    *,
    floor: int = 0,
    limit: int = UNLIMITED,
    weight: int = 1,
    disk_limit: int = UNLIMITED,
    keys: dict[int, bytes] | None = None,
) -> TenantShare:
    """Of the host's memory."""
    return TenantShare(
        tenant=tenant,
        partitions=Partitions(
            host=TierPartition(floor_bytes=floor, limit_bytes=limit),
            disk=TierPartition(limit_bytes=disk_limit),
        ),
        weight=weight,
        tenant_uid=f"uid of {tenant}",
        data_keys={1: KEY} if keys is None else keys,
    )


@asynccontextmanager
async def tenanted(
    memory: Path, folder: Path | None, *tenants: TenantShare, **options: int
) -> AsyncIterator[EngineService]:
    settings = host_config(memory, folder, **options)
    settings = replace(settings, tenancy=TenancyConfig(database="unused"))
    async with running_engine(served_model("llama"), settings) as (service, _):
        await service.apply_shares(shares(1, *tenants))
        yield service


async def keep(service: EngineService, tenant: TenantId, name: str) -> None:
    """Upload a context of BOOK's length, and wait until it is where it is kept."""
    ids = [(7 * token + sum(map(ord, tenant + name))) % 50 + 3 for token in BOOK]
    opened = await service.open_context(ContextRequest(tenant=tenant, context_id=name))
    chunk = TokenChunk(0, array("I", ids).tobytes())
    await service.append_context(tenant, name, opened.upload, chunk)
    await service.finish_context(tenant, name, opened.upload)
    await service._stores.wait_idle()


async def on_host(service: EngineService, tenant: TenantId) -> list[str]:
    listed = await service.list_contexts(tenant)
    return [context.context_id for context in listed if Tier.HOST in context.tiers]
