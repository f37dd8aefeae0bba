"""Contexts as the front door sees them: long prompts that are computed once and used many times.

The engine implements `ContextBackend` beside `Backend`. All records are `msgspec` Structs.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits, Tier
from kvcluster.types import DEFAULT_TENANT, TenantId

if TYPE_CHECKING:
    from kvcluster.engine.api import PromptChunk


class ContextState(StrEnum):
    CREATING = "creating"
    """Tokens are still to come or to be computed."""
    ACTIVE = "active"
    """All of its blocks are there, or are read from host memory or disk when they are wanted."""
    DEGRADED = "degraded"
    """Blocks were given up or lost; its tokens are kept, and the next generation on it computes
    what is missing."""
    FAILED = "failed"
    """It could not be computed, or cannot be read here: `ContextRecord.message` says why."""
    DAMAGED = "damaged"
    """What is off the GPUs of it is not what was written. Nothing of it is used."""
    DELETING = "deleting"
    """Its blocks are being zeroed."""


class ContextRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A context to be uploaded, or one to be continued: then only the tenant, the id and the limits
    count."""

    tenant: TenantId = DEFAULT_TENANT
    context_id: str
    model: str = ""
    policy: str = ""
    display_name: str = ""
    ttl_s: float | None = None
    expire_time_s: float | None = None
    """Unix time; not with `ttl_s`."""
    pinned: bool = False
    total_tokens: int | None = None
    """Length after the upload, where it is known: refused early."""
    durable: bool = False
    """The upload is done when the context is on disk."""
    limits: TenantLimits = NO_LIMITS


class ContextChange(msgspec.Struct, frozen=True, kw_only=True):
    """What UpdateContext sets; None leaves as it is."""

    display_name: str | None = None
    pinned: bool | None = None
    ttl_s: float | None = None
    expire_time_s: float | None = None
    keeps_for_ever: bool = False
    """Takes the expiry away."""


class ContextRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of one context. Times are Unix seconds."""

    tenant: TenantId
    context_id: str
    uid: str
    etag: str
    display_name: str
    model: str
    policy: str
    state: ContextState
    message: str
    tiers: tuple[Tier, ...] = ()
    """Where all of its blocks are; none while it is computed or degraded."""
    host_bytes: int = 0
    """Of its files in the host's memory."""
    disk_bytes: int = 0
    """Of its files, an earlier state of it included."""
    token_count: int
    """Tokens that generations on it begin with."""
    received_tokens: int
    """Where an upload of token ids goes on."""
    received_bytes: int
    """Where an upload of text goes on."""
    kv_bytes: int
    """Stored, over all ranks; blocks that it shares with other contexts included."""
    ranks: int
    """That hold some of it."""
    compression_ratio: float
    """Bytes of its tokens' exact K and V over `kv_bytes`; 0 where nothing is stored."""
    attention_error: float
    """As `Usage.attention_error`, of the encoding of its own blocks."""
    pinned: bool
    expire_time_s: float | None
    create_time_s: float
    update_time_s: float
    last_access_time_s: float


class OpenedContext(msgspec.Struct, frozen=True, kw_only=True):
    """An upload may begin."""

    upload: int
    """Which of the context's uploads this is. A later one takes over from it."""
    record: ContextRecord


class ContextBackend(Protocol):
    """Every method may raise any `KvClusterError`. A context of another tenant is
    `ContextNotFound`, exactly as one that does not exist."""

    async def open_context(self, request: ContextRequest) -> OpenedContext:
        """Begin a context, go on with the upload of one, or append to one."""
        ...

    async def append_context(
        self, tenant: TenantId, context_id: str, upload: int, chunk: "PromptChunk"
    ) -> None:
        """Add a chunk; returns when the engine can take the next one. Tokens that came before are
        compared.

        Raises: PromptCorrupt (gap, or other tokens than before), InvalidField, ContextTooLong,
        QuotaExceeded, UploadStalled (another upload took over).
        """
        ...

    async def finish_context(self, tenant: TenantId, context_id: str, upload: int) -> ContextRecord:
        """The upload is complete; returns when all of it is computed."""
        ...

    async def get_context(self, tenant: TenantId, context_id: str) -> ContextRecord: ...

    async def list_contexts(self, tenant: TenantId) -> tuple[ContextRecord, ...]:
        """By id."""
        ...

    async def update_context(
        self,
        tenant: TenantId,
        context_id: str,
        change: ContextChange,
        *,
        etag: str,
        limits: TenantLimits,
    ) -> ContextRecord:
        """Raises: EtagMismatch, QuotaExceeded (pinned bytes)."""
        ...

    async def fork_context(
        self, tenant: TenantId, context_id: str, new_id: str, num_tokens: int, limits: TenantLimits
    ) -> ContextRecord:
        """A context with the first `num_tokens` of another (0: all), which shares its blocks;
        returns when it is there. Raises: ResourceExists, InvalidField."""
        ...

    async def delete_context(self, tenant: TenantId, context_id: str, etag: str) -> None:
        """Returns when every block that no other context shares is zeroed on its rank, those that
        running generations use as soon as these have ended."""
        ...
