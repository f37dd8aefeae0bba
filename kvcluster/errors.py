"""Every error that kvcluster raises on purpose.

    KvClusterError
    ├── ConfigError               a setting is wrong
    │   ├── CalibrationMismatch   the calibration file is damaged or not this model's
    │   └── SavedCacheMismatch    the saved cache is damaged or cannot be read here
    ├── ModelError
    │   ├── ModelNotFound         no model of that name is served or on disk
    │   └── ModelUnsupported      its attention cannot be sharded correctly: refused at load
    ├── RequestError              the caller can fix it; nothing was allocated
    │   ├── InvalidField
    │   ├── PolicyUnsupported     this model cannot compress its cache so
    │   ├── ContextTooLong
    │   ├── PromptCorrupt         gap, overlap or wrong checksum in an upload
    │   ├── MessageTooLarge
    │   ├── MalformedMessage      the bytes are not the expected message
    │   ├── UploadStalled
    │   ├── RequestIdConflict
    │   ├── GenerationNotFound
    │   ├── ContextNotFound
    │   ├── ContextNotReady       it is still uploaded or computed, or could not be
    │   ├── ResumeExpired
    │   ├── ResourceNotFound      no such tenant or API key
    │   ├── ResourceExists
    │   ├── EtagMismatch          somebody else changed it first
    │   └── StateConflict         the tenant's state does not allow the act
    ├── AccessError               not with this credential
    │   ├── CredentialInvalid
    │   └── PermissionDenied
    ├── AdmissionError            correct, but not now (or not here)
    │   ├── QuotaExceeded
    │   ├── TenantSuspended
    │   ├── TenantDraining
    │   ├── ClusterOverloaded
    │   ├── DeadlineInfeasible
    │   └── Draining
    ├── SpillError                a context's way to disk and back
    │   ├── SealedCacheDamaged    changed, cut short, moved or replaced since it was written
    │   ├── SealedCacheErased     its key was destroyed
    │   ├── SealedCacheUnknown    no such spill of this tenant
    │   ├── SpillDiskFull
    │   └── SpillUnavailable      the disk cannot be read or written
    ├── StoreUnavailable          the tenants' records cannot be read or written now
    ├── DeadlineExceeded
    ├── ClientTooSlow             the client stopped reading its events
    ├── ServerUnavailable         no server answers; raised by the client alone
    ├── ComputationFailed         of one request, on a rank; the others go on
    └── RankLost                  a rank died, hung or answered out of order

An error carries what a caller needs to act: `reason` (stable, an `ErrorReason` of the protos
without its prefix), a sentence that says what to do, `metadata`, and `retry_after_s` where trying
again can help. Each crosses process boundaries as an `ErrorRecord`.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import msgspec


class ErrorRecord(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An error in transit between two processes of the cluster."""

    kind: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None = None


class KvClusterError(Exception):
    """Root of the tree. `message` is one sentence that says what is wrong and what to do."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> "tuple[Callable[[ErrorRecord], KvClusterError], tuple[ErrorRecord]]":
        # Ray pickles what an actor raises; subclasses have constructors of their own.
        return from_record, (self.to_record(),)

    def to_record(self) -> ErrorRecord:
        return ErrorRecord(
            kind=type(self).__name__,
            message=self.message,
            metadata=self.metadata,
            retry_after_s=self.retry_after_s,
        )


class ConfigError(KvClusterError):
    """A setting has a wrong value or an unknown name."""

    reason = "INVALID_CONFIG"


class CalibrationMismatch(ConfigError):
    """The calibration file is damaged, or was made for another model or version. Calibrate again,
    or name the right file."""


class SavedCacheMismatch(ConfigError):
    """The saved cache is damaged, or its bytes mean something else here: another model, dtype,
    codec or block size. Compute the context again, or load it where it was saved."""


class ModelError(KvClusterError):
    """The model cannot be served."""

    reason = "MODEL_UNSUPPORTED"


class ModelNotFound(ModelError):
    """No such model is served here, or its files are not on this machine."""

    reason = "MODEL_NOT_FOUND"


class ModelUnsupported(ModelError):
    """Sharding this model's attention would give wrong answers, so it is refused at load."""


class RequestError(KvClusterError):
    """The request itself is wrong; sending it again unchanged cannot help."""


class InvalidField(RequestError):
    """A request field has a value outside its rule. `metadata["field"]` names it."""

    reason = "INVALID_FIELD"

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field}: {rule}", metadata={"field": field})


class PolicyUnsupported(RequestError):
    """The policy is well formed, but this model cannot serve it, or nothing measured meets it."""

    reason = "POLICY_UNSUPPORTED"


class ContextTooLong(RequestError):
    """Prompt plus output is over the model's limit."""

    reason = "CONTEXT_TOO_LONG"

    def __init__(self, *, num_tokens: int, limit_tokens: int, is_lower_bound: bool = False) -> None:
        over = num_tokens - limit_tokens
        at_least = "at least " if is_lower_bound else ""
        super().__init__(
            f"prompt and max_output_tokens need {at_least}{num_tokens} tokens, the limit is "
            f"{limit_tokens}: cut {at_least}{over} tokens",
            metadata={"limit_tokens": str(limit_tokens), "over_tokens": str(over)},
        )


class PromptCorrupt(RequestError):
    """A chunk does not continue the last one, or its checksum is wrong. Upload again."""

    reason = "PROMPT_CORRUPT"


class MessageTooLarge(RequestError):
    """One message is over the limit. Send the prompt in smaller chunks."""

    reason = "MESSAGE_TOO_LARGE"


class MalformedMessage(RequestError):
    """The bytes are not the expected message, or a string in it is not UTF-8."""

    reason = "MALFORMED_MESSAGE"


class UploadStalled(RequestError):
    """No prompt chunk came for too long, so the generation was given up."""

    reason = "UPLOAD_STALLED"


class RequestIdConflict(RequestError):
    """The request_id was already used with another body."""

    reason = "REQUEST_ID_CONFLICT"


class GenerationNotFound(RequestError):
    """No such generation: never was, or its events are no longer kept."""

    reason = "GENERATION_NOT_FOUND"


class ContextNotFound(RequestError):
    """No such context: never was, is not the caller's, has expired or was deleted."""

    reason = "CONTEXT_NOT_FOUND"


class ContextNotReady(RequestError):
    """The context is still being uploaded or computed, or could not be computed."""

    reason = "CONTEXT_NOT_READY"


class ResumeExpired(RequestError):
    """The position to resume from is not in the generation's history."""

    reason = "RESUME_EXPIRED"


class ResourceNotFound(RequestError):
    """No such tenant or API key, told to those who may see all of them."""

    reason = "RESOURCE_NOT_FOUND"


class ResourceExists(RequestError):
    """A tenant or API key of this id exists already. Choose another id."""

    reason = "RESOURCE_EXISTS"


class EtagMismatch(RequestError):
    """The tenant was changed since its etag was read. Read it again, then decide again."""

    reason = "ETAG_MISMATCH"


class StateConflict(RequestError):
    """The act is not possible in the state that the tenant is in."""

    reason = "TENANT_STATE_CONFLICT"


class AccessError(KvClusterError):
    """The caller may not do this with the credential that it has."""


class CredentialInvalid(AccessError):
    """No credential, or one that is malformed, unknown, expired or revoked: which, is not told."""

    reason = "CREDENTIAL_INVALID"


class PermissionDenied(AccessError):
    """The credential is good, but not for this; or what it names does not exist."""

    reason = "PERMISSION_DENIED"


class AdmissionError(KvClusterError):
    """A correct request that is refused before anything is allocated for it."""


class QuotaExceeded(AdmissionError):
    """A limit of the tenant is reached, or its partition cannot hold this request."""

    reason = "TENANT_QUOTA_EXCEEDED"


class TenantSuspended(AdmissionError):
    """An operator suspended the tenant. Nothing helps until it is resumed."""

    reason = "TENANT_SUSPENDED"


class TenantDraining(AdmissionError):
    """The tenant's running generations finish, and no more are taken."""

    reason = "TENANT_DRAINING"


class ClusterOverloaded(AdmissionError):
    """Too much is waiting already. Try again after `retry_after_s`."""

    reason = "CLUSTER_OVERLOADED"


class DeadlineInfeasible(AdmissionError):
    """The estimate is already over the deadline, so no work is started."""

    reason = "DEADLINE_INFEASIBLE"


class Draining(AdmissionError):
    """The server is stopping and takes no more requests. Try another one."""

    reason = "DRAINING"


class DeadlineExceeded(KvClusterError):
    """The deadline passed while the request ran; everything it held was freed."""

    reason = "DEADLINE_EXCEEDED"


class ClientTooSlow(KvClusterError):
    """The client did not read its events in time. They are kept: resume the generation."""

    reason = "CLIENT_TOO_SLOW"


class StoreUnavailable(KvClusterError):
    """The tenants' records cannot be read or written now: disk full, read-only, locked. What was
    acknowledged is kept; nothing is done in half."""

    reason = "STORE_UNAVAILABLE"


class SpillError(KvClusterError):
    """A context cannot be written to disk or read from there."""

    reason = "SPILL_FAILED"


class SealedCacheDamaged(SpillError):
    """A sealed file is not what was written. Nothing of it was used: compute the context again."""

    reason = "CONTEXT_DAMAGED"


class SealedCacheErased(SpillError):
    """The tenant's data key was destroyed, and with it everything that it sealed."""

    reason = "CONTEXT_ERASED"


class SealedCacheUnknown(SpillError):
    """The tenant has no such spill: it never was, was deleted, or is another's. Inside the cluster
    only: callers ask for contexts."""


class SpillDiskFull(SpillError):
    """No room on the disk. What was there before is untouched, and nothing of this was kept."""

    reason = "DISK_FULL"


class SpillUnavailable(SpillError):
    """The disk cannot be read or written: look at it. What was committed is kept."""

    reason = "DISK_UNAVAILABLE"


class ServerUnavailable(KvClusterError):
    """The server cannot be reached, or the connection to it broke. Raised by `Client` alone."""

    reason = "SERVER_UNAVAILABLE"


class ComputationFailed(KvClusterError):
    """The computation of one request failed on a rank: something of its cache could not be done, or
    the model's predictions for it were no numbers. No other request is concerned. Choose another
    policy. `metadata` has the policy, what the rank was doing, and the class of the exception, if
    there was one."""

    reason = "COMPUTATION_FAILED"

    def __init__(self, *, policy: str, doing: str, kind: str) -> None:
        what = f"failed at {doing} ({kind})" if kind else f"failed at {doing}"
        super().__init__(
            f"policy {policy} {what}: choose another policy for this request, and report it to the "
            "operator of this server",
            metadata={"policy": policy, "doing": doing, "kind": kind},
        )


class RankLost(KvClusterError):
    """A rank died, missed its deadline or broke the step protocol. The ring group must rebuild."""

    reason = "SHARD_LOST"


def from_record(record: ErrorRecord) -> KvClusterError:
    """Rebuild the error that `to_record` described, with its class where it is one of ours."""
    kind = _KINDS.get(record.kind, KvClusterError)
    error = kind.__new__(kind)
    KvClusterError.__init__(
        error, record.message, metadata=record.metadata, retry_after_s=record.retry_after_s
    )
    return error


def _subclasses(kind: type[KvClusterError]) -> dict[str, type[KvClusterError]]:
    found = {kind.__name__: kind}
    for child in kind.__subclasses__():
        found |= _subclasses(child)
    return found


_KINDS = _subclasses(KvClusterError)
