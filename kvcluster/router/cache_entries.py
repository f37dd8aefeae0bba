"""The cache entries of a tenant over all engines: messages, pages, and one purge of all."""

import asyncio
from collections.abc import Sequence

from kvcluster.engine.api import Backend
from kvcluster.engine.cache_api import (
    CacheAmount,
    CacheEntry,
    CachePurge,
    CachePurged,
    Standing,
)
from kvcluster.errors import InvalidField, ResourceNotFound
from kvcluster.router import names, paging
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.types import TenantId

_MAX_NAMES = 1000
_STATES = {each: pb.CacheEntry.State.Value(f"STATE_{each.name}") for each in Standing}


async def page(
    backends: Sequence[Backend], tenant: TenantId, message: pb.ListCacheEntriesRequest
) -> pb.ListCacheEntriesResponse:
    """By id. Raises: InvalidField, and what the engines say."""
    found = await asyncio.gather(*(each.list_cache_entries(tenant) for each in backends))
    entries = paging.page_of(
        (entry for own in found for entry in own),
        key=lambda entry: entry.entry,
        page_size=message.page_size,
        page_token=message.page_token,
    )
    return pb.ListCacheEntriesResponse(
        cache_entries=[_to_proto(tenant, entry) for entry in entries.items],
        next_page_token=entries.next_token,
    )


def wanted_in(message: pb.PurgeCacheEntriesRequest, tenant: TenantId) -> CachePurge:
    """Raises: InvalidField."""
    if len(message.names) > _MAX_NAMES:
        raise InvalidField("names", f"want at most {_MAX_NAMES}, got {len(message.names)}")
    has_namespace = message.HasField("cache_namespace")
    return CachePurge(
        entries=tuple(names.cache_entry_of(name, tenant) for name in message.names),
        cache_namespace=message.cache_namespace if has_namespace else None,
        validates_only=message.validate_only,
    )


def said(wanted: CachePurge) -> dict[str, object]:
    """What the audit log keeps of a purge."""
    fields: dict[str, object] = {"entries": list(wanted.entries)}
    if wanted.cache_namespace is not None:
        fields["cache_namespace"] = wanted.cache_namespace
    return fields


async def check_found(backends: Sequence[Backend], tenant: TenantId, wanted: CachePurge) -> None:
    """Raises: ResourceNotFound unless each entry that is named is the tenant's in some engine. What
    is another tenant's is not there, like what never was."""
    if not wanted.entries:
        return
    only_asks = CachePurge(entries=wanted.entries, validates_only=True)
    told = await _purged(backends, tenant, only_asks)
    missing = set(wanted.entries).difference(*(each.found for each in told))
    if missing:
        raise ResourceNotFound(
            f"{len(missing)} of the cache entries are not there, or no longer: list them again"
        )


async def purge(
    backends: Sequence[Backend], tenant: TenantId, wanted: CachePurge
) -> pb.PurgeCacheEntriesResponse:
    """Returns when all engines have zeroed what they give up."""
    told = await _purged(backends, tenant, wanted)
    return pb.PurgeCacheEntriesResponse(
        purged=_sum([each.given_up for each in told]),
        in_use=_sum([each.in_use for each in told]),
        in_contexts=_sum([each.in_contexts for each in told]),
        followed=_sum([each.followed for each in told]),
    )


async def _purged(
    backends: Sequence[Backend], tenant: TenantId, wanted: CachePurge
) -> list[CachePurged]:
    return await asyncio.gather(*(each.purge_cache_entries(tenant, wanted) for each in backends))


def _sum(amounts: Sequence[CacheAmount]) -> pb.CacheAmount:
    total = sum(amounts, CacheAmount())
    return pb.CacheAmount(entries=total.num_entries, kv_bytes=total.num_bytes)


def _to_proto(tenant: TenantId, entry: CacheEntry) -> pb.CacheEntry:
    message = pb.CacheEntry(
        name=names.cache_entry_name(tenant, entry.entry),
        model=entry.model,
        policy=entry.policy,
        cache_namespace=entry.cache_namespace,
        start_token=entry.start_token,
        token_count=entry.num_tokens,
        kv_bytes=entry.num_bytes,
        state=_STATES[entry.standing],
    )
    message.last_use_time.FromMicroseconds(round(entry.last_use_s * 1e6))
    return message
