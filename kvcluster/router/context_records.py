"""Contexts between protos and the domain, both ways: the client reads what the router writes."""

import math
from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from kvcluster.engine.context_api import (
    ContextChange,
    ContextRecord,
    ContextRequest,
    ContextState,
)
from kvcluster.errors import InvalidField
from kvcluster.router import names
from kvcluster.router.convert import duration
from kvcluster.rpc.v1 import context_service_pb2 as pb
from kvcluster.tenancy.limits import TenantLimits, Tier
from kvcluster.types import TenantId

_STATES = {state: pb.Context.State.Value(f"STATE_{state.name}") for state in ContextState}
_STATE_OF = {number: state for state, number in _STATES.items()}
_TIERS = {tier: pb.Context.Tier.Value(f"TIER_{tier.name}") for tier in Tier}
_TIER_OF = {number: tier for tier, number in _TIERS.items()}
_CHANGEABLE = ("display_name", "pinned", "ttl", "expire_time")


def context_to_proto(record: ContextRecord) -> pb.Context:
    message = pb.Context(
        name=names.context_name(record.tenant, record.context_id),
        uid=record.uid,
        etag=record.etag,
        display_name=record.display_name,
        model=record.model,
        state=_STATES[record.state],
        token_count=record.token_count,
        received_tokens=record.received_tokens,
        received_bytes=record.received_bytes,
        kv_bytes=record.kv_bytes,
        ranks=record.ranks,
        compression_ratio=record.compression_ratio,
        attention_error=record.attention_error,
        pinned=record.pinned,
        create_time=_timestamp(record.create_time_s),
        update_time=_timestamp(record.update_time_s),
        last_access_time=_timestamp(record.last_access_time_s),
        policy=record.policy,
        message=record.message,
        tiers=[_TIERS[tier] for tier in record.tiers],
        host_bytes=record.host_bytes,
        disk_bytes=record.disk_bytes,
    )
    if record.expire_time_s is not None:
        message.expire_time.CopyFrom(_timestamp(record.expire_time_s))
    return message


def context_from_proto(message: pb.Context) -> ContextRecord:
    """The record as a client has it: `context_id` is the resource name."""
    return ContextRecord(
        tenant=TenantId(message.name.split("/")[1]),
        context_id=message.name,
        uid=message.uid,
        etag=message.etag,
        display_name=message.display_name,
        model=message.model,
        policy=message.policy,
        state=_STATE_OF.get(message.state, ContextState.CREATING),
        message=message.message,
        tiers=tuple(_TIER_OF[tier] for tier in message.tiers if tier in _TIER_OF),
        host_bytes=message.host_bytes,
        disk_bytes=message.disk_bytes,
        token_count=message.token_count,
        received_tokens=message.received_tokens,
        received_bytes=message.received_bytes,
        kv_bytes=message.kv_bytes,
        ranks=message.ranks,
        compression_ratio=message.compression_ratio,
        attention_error=message.attention_error,
        pinned=message.pinned,
        expire_time_s=(
            _to_seconds(message.expire_time) if message.HasField("expire_time") else None
        ),
        create_time_s=_to_seconds(message.create_time),
        update_time_s=_to_seconds(message.update_time),
        last_access_time_s=_to_seconds(message.last_access_time),
    )


def setup_from_proto(
    message: pb.UploadContextRequest.Setup, tenant: TenantId, limits: TenantLimits
) -> ContextRequest:
    """Raises: InvalidField."""
    names.check_parent(message.parent, tenant)
    context = message.context
    return ContextRequest(
        tenant=tenant,
        context_id=names.checked_context_id(message.context_id, "setup.context_id"),
        model=context.model.removeprefix("models/"),
        policy=context.policy,
        display_name=context.display_name,
        ttl_s=_span(context.ttl) if context.HasField("ttl") else None,
        expire_time_s=(
            _to_seconds(context.expire_time) if context.HasField("expire_time") else None
        ),
        pinned=context.pinned,
        total_tokens=message.total_tokens if message.HasField("total_tokens") else None,
        durable=context.durable,
        limits=limits,
    )


def setup_to_proto(request: ContextRequest) -> pb.UploadContextRequest.Setup:
    """Tenant and limits travel with the credential; the tenant is named all the same."""
    context = pb.Context(
        model=request.model,
        policy=request.policy,
        display_name=request.display_name,
        pinned=request.pinned,
        durable=request.durable,
    )
    if request.ttl_s is not None:
        context.ttl.CopyFrom(duration(request.ttl_s))
    return pb.UploadContextRequest.Setup(
        parent=names.tenant_name(request.tenant),
        context_id=request.context_id,
        context=context,
        total_tokens=request.total_tokens,
    )


def change_from_proto(message: pb.Context, mask: FieldMask | None) -> ContextChange:
    """What an update asks for. Raises: InvalidField."""
    paths = _paths_set_in(message) if mask is None else list(mask.paths)
    if paths == ["*"]:
        paths = ["display_name", "pinned", "expire_time"]
    for path in paths:
        if path not in _CHANGEABLE:
            raise InvalidField(
                "update_mask", f"want some of {', '.join(_CHANGEABLE)}, or * for all; got {path!r}"
            )
    expires = message.WhichOneof("expiration")
    names_expiry = bool({"ttl", "expire_time"} & set(paths))
    return ContextChange(
        display_name=message.display_name if "display_name" in paths else None,
        pinned=message.pinned if "pinned" in paths else None,
        ttl_s=_span(message.ttl) if names_expiry and expires == "ttl" else None,
        expire_time_s=(
            _to_seconds(message.expire_time) if names_expiry and expires == "expire_time" else None
        ),
        keeps_for_ever=names_expiry and expires is None,
    )


def update_to_proto(name: str, change: ContextChange, etag: str) -> pb.UpdateContextRequest:
    context = pb.Context(name=name, etag=etag)
    paths = []
    if change.display_name is not None:
        context.display_name = change.display_name
        paths.append("display_name")
    if change.pinned is not None:
        context.pinned = change.pinned
        paths.append("pinned")
    if change.ttl_s is not None:
        context.ttl.CopyFrom(duration(change.ttl_s))
    if change.ttl_s is not None or change.keeps_for_ever:
        paths.append("ttl")
    return pb.UpdateContextRequest(context=context, update_mask=FieldMask(paths=paths))


def _paths_set_in(message: pb.Context) -> Sequence[str]:
    given = {field.name for field, _ in message.ListFields()}
    return [path for path in _CHANGEABLE if path in given]


def _timestamp(unix_s: float) -> Timestamp:
    message = Timestamp()
    message.FromNanoseconds(round(unix_s * 1e9))
    return message


def _to_seconds(message: Timestamp) -> float:
    return message.seconds + message.nanos / 1e9


def _span(message: Duration) -> float:
    seconds = message.seconds + message.nanos / 1e9
    return seconds if math.isfinite(seconds) else 0.0
