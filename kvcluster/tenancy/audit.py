"""The audit log as a chain: each event's digest covers the event and the digest before it.

Whoever changes, removes, adds or reorders events without writing all later ones anew is found by
`check_chain`. With a root key the digests are signatures, and so is the note of which event is
last: whoever has the database alone can then neither write another chain nor cut this one short.
Without, only a digest that was kept elsewhere tells. Putting back an older copy of the whole
database is found in neither case, except by such a digest.
"""

import hashlib
import hmac
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from kvcluster.tenancy.root_key import signature
from kvcluster.tenancy.tenant import AuditEvent

START = bytes(32)
"""What stands for the event before the first."""


class ChainHead(NamedTuple):
    """The last event of a chain, as the store counts it."""

    number: int = 0
    digest: bytes = START
    mac: bytes = b""
    """Of the two above, by the audit key; empty without one."""


class ChainReport(NamedTuple):
    """What a check found."""

    num_events: int
    digest: bytes
    """Of the last event that follows from those before."""
    fault: str
    """What is wrong first; empty: nothing."""


def sealed(event: AuditEvent, key: bytes = b"") -> AuditEvent:
    """The event with its digest. `key`: of the audit log; empty: there is none."""
    return msgspec.structs.replace(event, digest=digest_of(event, key))


def head_of(event: AuditEvent, key: bytes = b"") -> ChainHead:
    """What the store notes when `event` is the last."""
    mac = signature(key, event.number, event.digest) if key else b""
    return ChainHead(event.number, event.digest, mac)


def digest_of(event: AuditEvent, key: bytes = b"") -> bytes:
    """SHA-256 of every field but the digest, in order; with a key their HMAC-SHA256. msgpack marks
    where each field ends, so no two different events have the same text."""
    fields = [
        getattr(event, field.name)
        for field in msgspec.structs.fields(event)
        if field.name != "digest"
    ]
    if key:
        return signature(key, *fields)
    return hashlib.sha256(msgspec.msgpack.encode(fields)).digest()


def check_chain(events: Iterable[AuditEvent], head: ChainHead, key: bytes = b"") -> ChainReport:
    """Check all `events`, in order, against each other and against what the store says is last."""
    last = ChainHead()
    if key and head.number and not _is_signed(head, key):
        return ChainReport(0, START, "the note of the last event was not written with the root key")
    for event in events:
        fault = _fault_of(event, last, key)
        if fault:
            return ChainReport(last.number, last.digest, fault)
        last = ChainHead(event.number, event.digest)
    fault = "" if _is_same(last, head) else f"event {last.number} is not the last one written"
    return ChainReport(last.number, last.digest, fault)


def _is_signed(head: ChainHead, key: bytes) -> bool:
    return hmac.compare_digest(head.mac, signature(key, head.number, head.digest))


def _fault_of(event: AuditEvent, before: ChainHead, key: bytes) -> str:
    if event.number != before.number + 1:
        return f"after event {before.number} comes event {event.number}"
    if not hmac.compare_digest(event.previous, before.digest):
        return f"event {event.number} does not follow from the one before"
    if not hmac.compare_digest(event.digest, digest_of(event, key)):
        return f"event {event.number} was changed after it was written"
    return ""


def _is_same(last: ChainHead, head: ChainHead) -> bool:
    return last.number == head.number and hmac.compare_digest(last.digest, head.digest)


def changed_fields(before: msgspec.Struct | None, after: msgspec.Struct) -> str:
    """The fields of `after` that differ from `before`, as JSON. None: all of them. What says
    nothing to a reader, and digests of secrets, are left out."""
    old = _flat(msgspec.to_builtins(before)) if before is not None else {}
    new = _flat(msgspec.to_builtins(after))
    changed = {name: value for name, value in new.items() if name not in old or old[name] != value}
    removed = {name: None for name in old if name not in new}
    return msgspec.json.encode(changed | removed, order="sorted").decode()


_UNSAID = frozenset({"revision", "update_time_s", "digest"})


def _flat(fields: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name not in _UNSAID or prefix:
            flat[f"{prefix}{name}"] = value
    return flat
