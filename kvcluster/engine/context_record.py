"""A context as its owner sees it."""

from kvcluster.cache.block_table import TableEntry
from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextRecord, ContextState
from kvcluster.engine.prefixes import Prefixes
from kvcluster.tenancy.limits import Tier
from kvcluster.types import ModelSpec


def record_of(
    context: Context, prefixes: Prefixes, spec: ModelSpec, block_size: int
) -> ContextRecord:
    """A snapshot of what is stored of a context, and what is known of it. Looks at every block."""
    entries: list[TableEntry] = []
    if context.can_be_read:
        entries = prefixes.held_at(context.tenant, context.keys, context.tokens, context.policy)
    sizes = block_bytes_per_group(spec, block_size)
    counts = prefixes.num_blocks(entries, context.policy) if entries else [0.0] * len(sizes)
    kv_bytes = round(sum(count * size for count, size in zip(counts, sizes, strict=True)))
    whole_bytes = len(entries) * block_size * spec.kv_bytes_per_token
    state = context.state
    is_computed = state in (ContextState.ACTIVE, ContextState.CREATING) and bool(context.tokens)
    is_in_memory = is_computed and len(entries) == len(context.keys.keys)
    tiers = [Tier.GPU] * is_in_memory
    tiers += [Tier.HOST] * (is_computed and context.is_on_host)
    tiers += [Tier.DISK] * (is_computed and context.is_on_disk)
    if state is ContextState.ACTIVE and not tiers:
        state = ContextState.DEGRADED
    return ContextRecord(
        tenant=context.tenant,
        context_id=context.id,
        uid=context.uid,
        etag=context.etag,
        display_name=context.display_name,
        model=spec.name,
        policy=str(context.policy),
        state=state,
        message=context.message or _not_kept(context),
        tiers=tuple(tiers),
        host_bytes=context.host.num_bytes,
        disk_bytes=context.disk.num_bytes,
        token_count=len(context.tokens),
        received_tokens=len(context.tokens if context.is_appended_to else context.received),
        received_bytes=context.kept_bytes if context.is_appended_to else context.received_bytes,
        kv_bytes=kv_bytes,
        ranks=len({entry.rank for entry in entries}),
        compression_ratio=whole_bytes / kv_bytes if kv_bytes else 0.0,
        attention_error=context.attention_error,
        pinned=context.pinned,
        expire_time_s=context.expire_time_s,
        create_time_s=context.create_time_s,
        update_time_s=context.update_time_s,
        last_access_time_s=context.last_access_time_s,
    )


def _not_kept(context: Context) -> str:
    """Why it is not where it should be."""
    if context.disk.error is not None:
        return f"not on disk: {context.disk.error.message}"
    if context.host.error is not None and not context.is_on_disk:
        return f"not in the host's memory: {context.host.error.message}"
    return ""
