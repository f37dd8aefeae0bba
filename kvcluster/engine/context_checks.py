"""What can be wrong with a call that names a context."""

from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextState
from kvcluster.errors import (
    ContextNotFound,
    ContextNotReady,
    EtagMismatch,
    InvalidField,
    KvClusterError,
    ModelNotFound,
    PolicyUnsupported,
    QuotaExceeded,
    SealedCacheDamaged,
    UploadStalled,
)
from kvcluster.types import Policy

MAX_NAME_CHARS = 200
MAX_TTL_S = 10 * 365 * 24 * 3600


def context_not_found() -> ContextNotFound:
    """One text for all cases, so that it does not tell whether another tenant has the name."""
    return ContextNotFound(
        "no such context: check the name; it never was, is not yours, has expired or was deleted"
    )


def not_ready(context: Context) -> ContextNotReady:
    """Why a context can be neither read nor continued now."""
    return ContextNotReady(
        f"context {context.id} is {context.state}{': ' if context.message else ''}"
        f"{context.message}; wait until its upload is complete, or upload it again"
    )


def being_computed(context: Context) -> ContextNotReady:
    """Why a context takes no more now, though an upload is not done."""
    return ContextNotReady(f"context {context.id} is being computed: add more after that")


def upload_over(context: Context) -> KvClusterError:
    """Why no more of an upload is taken."""
    if context.state is ContextState.ACTIVE:
        return UploadStalled("the upload was given up: send again what it was to add")
    return not_ready(context)


def unreadable(context: Context) -> KvClusterError:
    """Why a generation cannot begin with a context that is not active."""
    if context.state is ContextState.DELETING:
        return context_not_found()
    if context.state is ContextState.DAMAGED:
        return SealedCacheDamaged(
            f"context {context.id} is damaged on disk: {context.message}; delete it and upload it "
            "again"
        )
    return not_ready(context)


def check_continued(context: Context) -> None:
    """Whether more may be uploaded. Raises: ContextNotReady, SealedCacheDamaged."""
    if context.state is ContextState.DELETING:
        raise ContextNotReady(f"context {context.id} is being deleted: wait, or use another id")
    if context.state is ContextState.FAILED:
        raise ContextNotReady(f"context {context.id} failed: {context.message}; delete it")
    if context.state is ContextState.DAMAGED:
        raise unreadable(context)


def check_begun_with(context: Context, policy: Policy, *, wants_scores: bool) -> None:
    """What a generation on a context cannot ask for. Raises: InvalidField."""
    if policy != context.policy:
        raise InvalidField("policy", f"the context was stored with {context.policy}: leave it out")
    if wants_scores:
        raise InvalidField(
            "sampling.prompt_logprobs", "a context's tokens are not computed again: no scores"
        )


def check_etag(context: Context, etag: str) -> None:
    """Empty: any. Raises: EtagMismatch."""
    if etag and etag != context.etag:
        raise EtagMismatch(
            f"context {context.id} was changed since {etag}: get it again, then decide again",
            metadata={"etag": context.etag},
        )


def check_model(model: str, served: str) -> None:
    """Empty: whatever is served. Raises: ModelNotFound."""
    if model not in ("", served):
        raise ModelNotFound(f"model {model!r} is not served here; {served!r} is")


def check_count(num_contexts: int, limit: int) -> None:
    """Whether a tenant may have one more. Raises: QuotaExceeded."""
    if num_contexts >= limit:
        raise QuotaExceeded(
            f"contexts: {num_contexts} of the tenant's {limit}; delete one",
            metadata={"quota": "contexts", "used": str(num_contexts), "limit": str(limit)},
        )


def not_storable(policy: Policy) -> PolicyUnsupported:
    """Why a context cannot have a policy."""
    return PolicyUnsupported(
        f"policy: {policy} cannot store a context: with it later rows read more of a sequence than "
        "its blocks; leave out its selection, and tokens kept by score",
        metadata={"policy": str(policy)},
    )


def check_name(display_name: str) -> None:
    """Raises: InvalidField."""
    if len(display_name) > MAX_NAME_CHARS:
        raise InvalidField("context.display_name", f"want at most {MAX_NAME_CHARS} characters")


def expiry(ttl_s: float | None, expire_time_s: float | None, now_s: float) -> float | None:
    """When a context ends, in Unix time; None: never. NaN is refused too. Raises: InvalidField."""
    if ttl_s is not None:
        if not 0 < ttl_s <= MAX_TTL_S:
            raise InvalidField("context.ttl", f"want more than 0, at most {MAX_TTL_S} seconds")
        return now_s + ttl_s
    if expire_time_s is not None and not now_s < expire_time_s <= now_s + MAX_TTL_S:
        raise InvalidField("context.expire_time", "want a time to come, within ten years")
    return expire_time_s


def check_pinned(used_bytes: int, more_bytes: int, limit_bytes: int) -> None:
    """Raises: QuotaExceeded."""
    if used_bytes + more_bytes > limit_bytes:
        raise QuotaExceeded(
            f"max_pinned_bytes: {used_bytes} of the tenant's {limit_bytes}; {more_bytes} more do "
            "not fit: leave the context unpinned, or unpin another",
            metadata={
                "quota": "max_pinned_bytes",
                "used": str(used_bytes),
                "limit": str(limit_bytes),
            },
        )
