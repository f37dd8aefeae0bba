"""What tests of contexts on disk share: an engine over ranks in threads that has a folder."""

from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from kvcluster.config import CacheConfig, ClusterConfig, SpillConfig
from kvcluster.engine.api import TokenChunk
from kvcluster.engine.context_api import ContextRecord, ContextRequest
from kvcluster.engine.service import EngineService
from kvcluster.model.loader import LoadedModel
from kvcluster.tenancy.limits import UNLIMITED, Partitions, TierPartition
from kvcluster.tenancy.shares import TenantShare, TenantShares
from kvcluster.types import DEFAULT_TENANT, TenantId
from tests.distributed.test_contexts import config
from tests.served_model import served_model
from tests.thread_executor import running_engine

KEY = bytes(range(32))


def stored_config(folder: Path, num_ranks: int = 2, **changes: object) -> ClusterConfig:
    """As in `test_contexts`, with a disk. `changes`: of `SpillConfig`."""
    spill = SpillConfig(folder=str(folder), **changes)  # type: ignore[arg-type]
    return replace(config(num_ranks), spill=spill)


def with_capacity(base: ClusterConfig, num_tokens: int) -> ClusterConfig:
    """A rank holds so many tokens."""
    cache = base.cache
    changed = CacheConfig(
        block_size=cache.block_size,
        capacity_tokens=num_tokens,
        exact_recent_tokens=cache.exact_recent_tokens,
        prefix_cache=cache.prefix_cache,
    )
    return replace(base, cache=changed)


@asynccontextmanager
async def storing(
    folder: Path, num_ranks: int = 2, model: LoadedModel | None = None, **changes: object
) -> AsyncIterator[EngineService]:
    """An engine with a disk."""
    config = stored_config(folder, num_ranks, **changes)
    async with running_engine(model or served_model("llama"), config) as (service, _):
        yield service


async def finished(
    service: EngineService, ids: list[int], context_id: str, **fields: object
) -> ContextRecord:
    """Upload a context. `fields`: of the request."""
    request = ContextRequest(context_id=context_id, **fields)  # type: ignore[arg-type]
    opened = await service.open_context(request)
    chunk = TokenChunk(0, array("I", ids).tobytes())
    await service.append_context(DEFAULT_TENANT, context_id, opened.upload, chunk)
    return await service.finish_context(DEFAULT_TENANT, context_id, opened.upload)


async def stored(service: EngineService, ids: list[int], context_id: str, **fields: object) -> None:
    """Upload a context, and wait until it is on disk or could not be."""
    await finished(service, ids, context_id, **fields)
    await service._stores.wait_idle()


async def on_disk(service: EngineService, context_id: str = "book") -> ContextRecord:
    """The record once nothing is left to write."""
    await service._stores.wait_idle()
    return await service.get_context(DEFAULT_TENANT, context_id)


def files_in(folder: Path) -> list[Path]:
    """Of contexts."""
    return [path for path in (folder / "contexts").rglob("*") if path.is_file()]


def num_charged(service: EngineService, tenant: TenantId = DEFAULT_TENANT) -> int:
    """Bytes that count against the tenant's partition of the disk."""
    ledger = service._parts.stores.disk.ledger
    ledger.check()
    return ledger.use(tenant).used_bytes


def shares(
    revision: int,
    keys: dict[int, bytes] | None,
    *,
    disk_limit: int = UNLIMITED,
    gpu_limit: int = UNLIMITED,
    deleted: tuple[tuple[TenantId, str], ...] = (),
) -> TenantShares:
    """What a router pushes, of the tenant that tests use."""
    share = TenantShare(
        tenant=DEFAULT_TENANT,
        partitions=Partitions(
            gpu=TierPartition(limit_bytes=gpu_limit), disk=TierPartition(limit_bytes=disk_limit)
        ),
        tenant_uid="uid-1",
        data_keys=keys,
    )
    return TenantShares(revision=revision, shares=() if deleted else (share,), deleted=deleted)
