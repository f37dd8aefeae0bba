"""Tenants, keys and audit events between protos and the domain."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from kvcluster.engine.api import TenantLoad
from kvcluster.engine.context_api import ContextRecord, ContextState
from kvcluster.errors import InvalidField
from kvcluster.router import names
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.audit import ChainReport
from kvcluster.tenancy.limits import UNLIMITED, Partitions, TenantLimits, Tier, TierPartition
from kvcluster.tenancy.published import PublishedPrefix
from kvcluster.tenancy.tenant import (
    ApiKey,
    AuditEvent,
    KeyRole,
    Tenant,
    TenantState,
    check_tenant,
)

_STATES = {state: pb.Tenant.State.Value(f"STATE_{state.name}") for state in TenantState}
_ROLES = {role: pb.ApiKey.Role.Value(f"ROLE_{role.name}") for role in KeyRole}
_ROLE_OF = {number: role for role, number in _ROLES.items()}
_TIERS = ("gpu", "host", "disk")
_PARTS = ("partitions", "limits")
_CHANGEABLE = ("display_name", "labels", *_PARTS)
_MAX_TIMESTAMP_S = 253_402_300_799


def tenant_to_proto(tenant: Tenant) -> pb.Tenant:
    message = pb.Tenant(
        name=names.tenant_name(tenant.tenant),
        uid=tenant.uid,
        etag=tenant.etag,
        display_name=tenant.display_name,
        state=_STATES[tenant.state],
        state_reason=tenant.state_reason,
        labels=tenant.labels,
        key_version=tenant.key_version,
        create_time=_timestamp(tenant.create_time_s),
        update_time=_timestamp(tenant.update_time_s),
        delete_time=_timestamp(tenant.delete_time_s),
        purge_time=_timestamp(tenant.purge_time_s),
        drain_end_time=_timestamp(tenant.drain_end_s),
    )
    message.limits.SetInParent()
    _fill(message.limits, tenant.limits)
    for tier in _TIERS:
        share = getattr(message.partitions, tier)
        share.SetInParent()
        _fill(share, getattr(tenant.partitions, tier))
    return message


def tenant_with(tenant: Tenant, message: pb.Tenant) -> Tenant:
    """`tenant` with all that an operator may set as it is in `message`. Raises: InvalidField."""
    changed = msgspec.structs.replace(
        tenant,
        display_name=message.display_name,
        labels=dict(message.labels),
        partitions=Partitions(
            **{tier: TierPartition(**_set_in(getattr(message.partitions, tier))) for tier in _TIERS}
        ),
        limits=msgspec.structs.replace(
            TenantLimits(**_set_in(message.limits)),
            default_policy=message.limits.default_policy,
            allowed_policies=tuple(message.limits.allowed_policies),
        ),
    )
    check_tenant(changed)
    return changed


def masked(current: pb.Tenant, message: pb.Tenant, mask: FieldMask | None) -> pb.Tenant:
    """`current` with the fields of the mask as in `message`; one that is not set there gets its
    default. None: the fields that are set there. Raises: InvalidField."""
    paths = _paths_set_in(message) if mask is None else list(mask.paths)
    if paths == ["*"]:
        paths = list(_CHANGEABLE)
    for path in paths:
        is_known = FieldMask(paths=[path]).IsValidForDescriptor(pb.Tenant.DESCRIPTOR)
        if not is_known or path.partition(".")[0] not in _CHANGEABLE:
            raise InvalidField(
                "update_mask",
                f"want fields below {', '.join(_CHANGEABLE)}, or * for all of them",
            )
    merged = pb.Tenant()
    merged.CopyFrom(current)
    for path in paths:
        _clear(merged, path)
        FieldMask(paths=[path]).MergeMessage(
            message, merged, replace_message_field=True, replace_repeated_field=True
        )
    return merged


def key_to_proto(key: ApiKey) -> pb.ApiKey:
    return pb.ApiKey(
        name=key.name,
        display_name=key.display_name,
        role=_ROLES[key.role],
        create_time=_timestamp(key.create_time_s),
        expire_time=_timestamp(key.expire_time_s),
        revoke_time=_timestamp(key.revoke_time_s),
    )


def role_from_proto(message: pb.ApiKey) -> KeyRole:
    """Raises: InvalidField."""
    role = _ROLE_OF.get(message.role)
    if role is None:
        raise InvalidField("api_key.role", f"want one of {', '.join(r.name for r in KeyRole)}")
    return role


def expiry_from_proto(message: pb.ApiKey, *, now: float) -> float | None:
    """When a key to be made expires; None: never. Raises: InvalidField."""
    if not message.HasField("expire_time"):
        return None
    seconds = message.expire_time.seconds + message.expire_time.nanos / 1e9
    if not now < seconds <= _MAX_TIMESTAMP_S:
        raise InvalidField("api_key.expire_time", "want a time to come, of this era")
    return seconds


def event_to_proto(event: AuditEvent) -> pb.AuditEvent:
    return pb.AuditEvent(
        name=names.event_name(event.tenant, event.number),
        event_time=_timestamp(event.time_s),
        principal=event.principal,
        method=event.method,
        target=event.target,
        peer=event.peer,
        change=event.change,
        previous_sha256=event.previous,
        sha256=event.digest,
    )


def report_to_proto(report: ChainReport) -> pb.VerifyAuditLogResponse:
    return pb.VerifyAuditLogResponse(
        intact=not report.fault,
        events=report.num_events,
        sha256=report.digest,
        fault=report.fault,
    )


def usage_to_proto(
    tenant: Tenant, loads: Sequence[TenantLoad], *, num_open: int, now: float
) -> pb.TenantUsage:
    return pb.TenantUsage(
        name=names.usage_name(tenant.tenant),
        running_generations=sum(load.num_running for load in loads),
        queued_generations=sum(load.num_waiting for load in loads),
        open_streams=num_open,
        input_tokens_per_minute=sum(load.input_tokens for load in loads),
        output_tokens_per_minute=sum(load.output_tokens for load in loads),
        gpu_bytes=sum(load.kv_bytes for load in loads),
        gpu=_tier_usage(tenant.partitions.gpu, loads, Tier.GPU),
        host=_tier_usage(tenant.partitions.host, loads, Tier.HOST),
        disk=_tier_usage(tenant.partitions.disk, loads, Tier.DISK),
        refused_requests=sum(load.num_refused for load in loads),
        read_time=_timestamp(now),
    )


def _tier_usage(share: TierPartition, loads: Sequence[TenantLoad], tier: Tier) -> pb.TierUsage:
    """The share as it was set, and what the engines count."""
    found = [load.tiers[tier.value] for load in loads if tier.value in load.tiers]
    usage = pb.TierUsage(
        used_bytes=sum(each.used_bytes for each in found),
        borrowed_bytes=sum(each.borrowed_bytes for each in found),
        cached_bytes=sum(each.cached_bytes for each in found),
    )
    _fill(usage, share)
    return usage


def seconds_in(field: str, message: Duration, *, least: float, most: float) -> float:
    """Raises: InvalidField."""
    seconds = message.seconds + message.nanos / 1e9
    if not least <= seconds <= most:
        raise InvalidField(field, f"want {least:g} to {most:g} seconds")
    return seconds


def _fill(message: Message, record: TenantLimits | TierPartition) -> None:
    for field in msgspec.structs.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, tuple):
            getattr(message, field.name).extend(value)
        elif isinstance(value, str) or value != UNLIMITED or field.default != UNLIMITED:
            # Not set where that means the same: no reader wants to see 2**63 - 1.
            setattr(message, field.name, value)


def _set_in(message: Message) -> dict[str, Any]:
    """The numbers that are set, by field."""
    return {field.name: value for field, value in message.ListFields() if isinstance(value, int)}


def _paths_set_in(message: pb.Tenant) -> list[str]:
    paths = []
    for field, value in message.ListFields():
        if field.name in _PARTS:
            paths += [f"{field.name}.{inner.name}" for inner, _ in value.ListFields()]
        elif field.name in _CHANGEABLE:
            paths.append(field.name)
    return paths


def _clear(message: Message, path: str) -> None:
    """Clear one field. A mask alone leaves a message field that its source has not."""
    name, _, rest = path.partition(".")
    if rest and message.HasField(name):
        _clear(getattr(message, name), rest)
    elif not rest:
        message.ClearField(name)


def _timestamp(unix_s: float | None) -> Timestamp | None:
    if unix_s is None:
        return None
    fraction, whole = math.modf(unix_s)
    # A float of seconds since 1970 is no finer.
    return Timestamp(seconds=int(whole), nanos=int(fraction * 1e6) * 1000)


def published_to_proto(
    prefix: PublishedPrefix, found: Sequence[ContextRecord | None]
) -> pb.PublishedPrefix:
    """`found`: what each engine of its model has of it."""
    there = [record for record in found if record is not None]
    message = pb.PublishedPrefix(
        name=prefix.name,
        model=prefix.model,
        policy=prefix.policy or (there[0].policy if there else ""),
        token_count=min((record.token_count for record in there), default=0),
        kv_bytes=sum(record.kv_bytes for record in there),
        resident=len(there) == len(found) > 0
        and all(record.state is ContextState.ACTIVE for record in there),
    )
    message.create_time.FromMicroseconds(round(prefix.create_time_s * 1e6))
    return message
