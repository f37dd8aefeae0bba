"""Errors as gRPC status and back: the one table from error class to status code.

The router uses the way out, the client the way back.
"""

from collections.abc import Iterable

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from kvcluster import errors
from kvcluster.errors import ErrorRecord, InvalidField, KvClusterError

ERROR_DOMAIN = "kvcluster.dev"
DETAILS_KEY = "grpc-status-details-bin"
_MAX_TEXT_BYTES = 512
"""A status travels in headers, and a message may quote the caller's own text."""

STATUS_CODES: dict[type[KvClusterError], grpc.StatusCode] = {
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ModelUnsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
    errors.PolicyUnsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ContextTooLong: grpc.StatusCode.INVALID_ARGUMENT,
    errors.PromptCorrupt: grpc.StatusCode.INVALID_ARGUMENT,
    errors.MalformedMessage: grpc.StatusCode.INVALID_ARGUMENT,
    # As the transport itself answers a message over its limit.
    errors.MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UploadStalled: grpc.StatusCode.ABORTED,
    errors.RequestIdConflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.GenerationNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ContextNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ContextNotReady: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResumeExpired: grpc.StatusCode.OUT_OF_RANGE,
    errors.ResourceNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ResourceExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.EtagMismatch: grpc.StatusCode.ABORTED,
    errors.StateConflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CredentialInvalid: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.TenantSuspended: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TenantDraining: grpc.StatusCode.UNAVAILABLE,
    errors.StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ClusterOverloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineInfeasible: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.ClientTooSlow: grpc.StatusCode.ABORTED,
    errors.SealedCacheDamaged: grpc.StatusCode.DATA_LOSS,
    errors.SealedCacheErased: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SpillDiskFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SpillUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ComputationFailed: grpc.StatusCode.INTERNAL,
    errors.RankLost: grpc.StatusCode.UNAVAILABLE,
}
"""Every error that a caller can meet. Any other class is a bug of ours: INTERNAL."""

_KIND_OF_REASON = {kind.reason: kind for kind in STATUS_CODES}


def is_bug(error: BaseException) -> bool:
    """Whether nobody but us can act on this error, so that its text must not reach a caller."""
    return type(error) not in STATUS_CODES


def internal_error(trace_id: int) -> KvClusterError:
    """What a caller learns of a bug: the number under which it is in our log."""
    return KvClusterError(
        f"internal error: report trace_id {trace_id} to the operator of this server",
        metadata={"trace_id": str(trace_id)},
    )


def status_from_error(error: KvClusterError) -> status_pb2.Status:
    """The status that `error` ends a call with, ErrorInfo first among its details."""
    code = STATUS_CODES.get(type(error), grpc.StatusCode.INTERNAL)
    message = _clip(error.message)
    status = status_pb2.Status(code=code.value[0], message=message)
    details = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=ERROR_DOMAIN,
        metadata={key: _clip(value) for key, value in error.metadata.items()},
    )
    status.details.add().Pack(details)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(retry)
    if isinstance(error, InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clip(error.metadata.get("field", "")), description=message
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if "quota" in error.metadata:
        failure = error_details_pb2.QuotaFailure.Violation(
            subject=_clip(error.metadata["quota"]), description=message
        )
        status.details.add().Pack(error_details_pb2.QuotaFailure(violations=[failure]))
    return status


def error_from_rpc(
    code: grpc.StatusCode, details: str, trailing_metadata: Iterable[tuple[str, str | bytes]]
) -> KvClusterError:
    """The error that a server's status stands for; typed where the server said which.

    A status without ErrorInfo comes from the transport: the connection, the deadline, a limit.
    """
    for key, value in trailing_metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            error = _error_from_details(value)
            if error is not None:
                return error
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.ServerUnavailable(f"no answer from the server, try again: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded("the deadline of the call passed: allow more time")
    return KvClusterError(f"{code.name}: {details}")


def error_of_reason(
    reason: str,
    message: str,
    *,
    metadata: dict[str, str] | None = None,
    retry_after_s: float | None = None,
) -> KvClusterError:
    """The error with this `reason`, as its class; the root class where this version has none."""
    kind = _KIND_OF_REASON.get(reason, KvClusterError)
    return errors.from_record(
        ErrorRecord(
            kind=kind.__name__,
            message=message,
            metadata=metadata or {},
            retry_after_s=retry_after_s,
        )
    )


def error_of_kind(
    kind: str,
    message: str,
    *,
    metadata: dict[str, str] | None = None,
    retry_after_s: float | None = None,
) -> KvClusterError:
    """The error of the class named `kind`, as events carry it."""
    return errors.from_record(
        ErrorRecord(
            kind=kind, message=message, metadata=metadata or {}, retry_after_s=retry_after_s
        )
    )


def _error_from_details(raw: bytes) -> KvClusterError | None:
    try:
        status = status_pb2.Status.FromString(raw)
    except DecodeError:
        return None
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    if not _unpack_first(status.details, info) or info.domain != ERROR_DOMAIN:
        return None
    has_retry = _unpack_first(status.details, retry)
    return error_of_reason(
        info.reason,
        status.message,
        metadata=dict(info.metadata),
        retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if has_retry else None,
    )


def _unpack_first(
    details: Iterable[AnyMessage],
    target: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo,
) -> bool:
    return any(detail.Unpack(target) for detail in details)


def _clip(text: str) -> str:
    raw = text.encode()
    if len(raw) <= _MAX_TEXT_BYTES:
        return text
    return raw[:_MAX_TEXT_BYTES].decode(errors="ignore") + "…"
