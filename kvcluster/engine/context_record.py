"""A context as its owner sees it."""

from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextRecord, ContextState
from kvcluster.engine.prefixes import Prefixes
from kvcluster.types import ModelSpec


def record_of(
    context: Context, prefixes: Prefixes, spec: ModelSpec, block_size: int
) -> ContextRecord:
    """A snapshot of what is stored of a context, and what is known of it. Looks at every block."""
    entries = prefixes.held_at(context.tenant, context.keys, context.tokens, context.policy)
    sizes = block_bytes_per_group(spec, block_size)
    counts = prefixes.num_blocks(entries, context.policy)
    kv_bytes = round(sum(count * size for count, size in zip(counts, sizes, strict=True)))
    whole_bytes = len(entries) * block_size * spec.kv_bytes_per_token
    state = context.state
    if state is ContextState.ACTIVE and len(entries) < len(context.keys.keys):
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
        message=context.message,
        token_count=len(context.tokens),
        received_tokens=len(context.received),
        received_bytes=context.received_bytes,
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
