"""Contexts that are found on disk after a start."""

from kvcluster.cache.spill import SealedContext
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextRequest, ContextState
from kvcluster.engine.context_files import ContextFiles
from kvcluster.engine.context_note import context_of
from kvcluster.engine.parts import EngineParts
from kvcluster.engine.prefixes import Prefixes
from kvcluster.errors import SealedCacheDamaged, SealedCacheErased, SealedCacheUnknown
from kvcluster.types import Policy


def found_context(
    sealed: SealedContext, files: ContextFiles, parts: EngineParts, prefixes: Prefixes
) -> Context | None:
    """A context as it was when it was written, its blocks in no memory; None: its tenant's keys are
    not known now. One that cannot be read is damaged, and one of another model failed: both can be
    deleted. Blocks on the disk. Raises: SpillUnavailable."""
    owner = sealed.owner
    secret = parts.secret_of(owner.tenant)
    try:
        note = files.read_note(sealed)
    except (SealedCacheDamaged, SealedCacheErased) as error:
        request = ContextRequest(tenant=owner.tenant, context_id=owner.context)
        context = Context(
            request,
            uid=sealed.spill,
            policy=Policy(),
            keys=prefixes.keys(Policy(), "", secret),
            unix_s=sealed.create_time_s,
        )
        context.state, context.message = ContextState.DAMAGED, error.message
        context.disk.spill = sealed
        return context
    except SealedCacheUnknown:
        # Replaced or destroyed since it was listed.
        return None
    if note is None:
        return None
    context = context_of(note, owner, prefixes.keys(note.policy, "", secret))
    context.disk.spill = sealed
    mismatch = ""
    if note.weights_digest != parts.spec.weights_digest:
        mismatch = f"it was computed by model {note.model}, whose weights are not those here"
    elif note.block_size != parts.cache.block_size:
        mismatch = f"it has blocks of {note.block_size} tokens, here {parts.cache.block_size}"
    else:
        mismatch = parts.refusal(note.policy) or ""
    if mismatch:
        context.state, context.message = ContextState.FAILED, mismatch
    return context
