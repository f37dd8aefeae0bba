"""What is sealed beside the blocks of a context on disk: all that the engine has to know of it
after a restart."""

from array import array

import msgspec

from kvcluster.cache.block_keys import BlockKeys, Scope
from kvcluster.cache.spill import SpillOwner
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextRequest, ContextState
from kvcluster.errors import SealedCacheDamaged
from kvcluster.types import ModelSpec, Policy

_VERSION = 1


class ContextNote(msgspec.Struct, frozen=True, kw_only=True):
    """One context at the moment when it was written."""

    version: int
    uid: str
    weights_digest: str
    model: str
    """For messages."""
    block_size: int
    policy: Policy
    tokens: bytes
    """All of them, little-endian u32: those after the last whole block are computed again."""
    display_name: str
    pinned: bool
    expire_time_s: float | None
    create_time_s: float
    update_time_s: float
    last_access_time_s: float
    squared_error: float
    squared_size: float
    received_bytes: int


def note_of(context: Context, spec: ModelSpec, block_size: int) -> bytes:
    """The note of a context as it is now."""
    return msgspec.msgpack.encode(
        ContextNote(
            version=_VERSION,
            uid=context.uid,
            weights_digest=spec.weights_digest,
            model=spec.name,
            block_size=block_size,
            policy=context.policy,
            tokens=context.tokens.tobytes(),
            display_name=context.display_name,
            pinned=context.pinned,
            expire_time_s=context.expire_time_s,
            create_time_s=context.create_time_s,
            update_time_s=context.update_time_s,
            last_access_time_s=context.last_access_time_s,
            squared_error=context.squared_error,
            squared_size=context.squared_size,
            received_bytes=context.kept_bytes,
        )
    )


def read_note(note: bytes) -> ContextNote:
    """Raises: SealedCacheDamaged, for a note of another version too."""
    try:
        found = msgspec.msgpack.decode(note, type=ContextNote)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise SealedCacheDamaged("the note of a sealed context cannot be read") from error
    if found.version != _VERSION or len(found.tokens) % array("I").itemsize:
        raise SealedCacheDamaged(
            f"the note of a sealed context has version {found.version}, not {_VERSION}: compute "
            "the context again"
        )
    return found


def context_of(note: ContextNote, owner: SpillOwner, keys: BlockKeys) -> Context:
    """The context that a note is of, its blocks in no memory. `keys`: none yet, under its
    policy."""
    request = ContextRequest(
        tenant=owner.tenant,
        context_id=owner.context,
        display_name=note.display_name,
        pinned=note.pinned,
    )
    context = Context(
        request, uid=note.uid, policy=note.policy, keys=keys, unix_s=note.create_time_s
    )
    context.tokens = array("I", note.tokens)
    context.keys.extend(context.tokens)
    context.expire_time_s = note.expire_time_s
    context.update_time_s = note.update_time_s
    context.last_access_time_s = note.last_access_time_s
    context.squared_error, context.squared_size = note.squared_error, note.squared_size
    context.received_bytes = context.kept_bytes = note.received_bytes
    context.state = ContextState.ACTIVE
    return context


def block_keys(
    secret: bytes, tokens: "array[int]", spec: ModelSpec, policy: Policy, block_size: int
) -> tuple[bytes, ...]:
    """Names of a context's whole blocks under a secret of its spill: what its files are bound to.
    Those in memory have others, which end with the process."""
    keys = BlockKeys(secret, Scope(spec.weights_digest, str(policy), block_size, ""))
    keys.extend(tokens)
    return tuple(keys.keys)
