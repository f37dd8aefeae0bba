"""What the front door sees of an engine: requests in, events out, and the `Backend` protocol.

The engine implements `Backend` in its own process; the router calls it there or through a remote
stand-in that has the same methods. All records are `msgspec` Structs.
"""

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

import msgspec

from kvcluster.engine.cache_api import CacheBackend
from kvcluster.engine.context_api import ContextBackend
from kvcluster.policy import Menu
from kvcluster.tenancy.limits import NO_LIMITS, UNLIMITED, TenantLimits
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import (
    DEFAULT_TENANT,
    GenerationId,
    ModelSpec,
    Policy,
    SamplingParams,
    TenantId,
)


class CacheMode(StrEnum):
    """What a request does with the blocks that its tenant keeps of earlier ones."""

    READ_WRITE = "read_write"
    READ_ONLY = "read_only"
    """Its own blocks are not kept."""
    BYPASS = "bypass"
    """It computes everything, and leaves nothing."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, without its prompt: that follows in chunks."""

    tenant: TenantId = DEFAULT_TENANT
    model: str
    max_output_tokens: int
    sampling: SamplingParams = SamplingParams()
    policy: str = ""
    """In the policy language (`policy`); empty: the default."""
    request_id: str = ""
    """Idempotency key, unique within the tenant; empty: none."""
    input_tokens: int | None = None
    """Length of the prompt where the client declares it: refused early, exact progress."""
    deadline_s: float | None = None
    """Seconds from now until the caller's deadline."""
    progress_interval_s: float = 1.0
    disconnect_grace_s: float = 0.0
    """How long the generation goes on with nobody reading its events; 0: ends at once."""
    priority: int = 0
    context: str = ""
    """Id of a context of the tenant that comes before the prompt; empty: none."""
    cache_mode: CacheMode = CacheMode.READ_WRITE
    cache_namespace: str = ""
    """Blocks are shared within one namespace of the tenant only."""
    limits: TenantLimits = NO_LIMITS
    """The tenant's, as they are now. Like the tenant, from the credential and from no field."""


class TextChunk(msgspec.Struct, frozen=True, tag="text"):
    """Part of a prompt as text. `offset` counts UTF-8 bytes."""

    offset: int
    text: str


class TokenChunk(msgspec.Struct, frozen=True, tag="tokens"):
    """Part of a prompt as little-endian u32 token ids. `offset` counts tokens."""

    offset: int
    packed_ids: bytes


PromptChunk = TextChunk | TokenChunk


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class Phase(StrEnum):
    QUEUED = "queued"
    UPLOADING = "uploading"
    PREFILLING = "prefilling"
    DECODING = "decoding"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    kv_bytes: int
    """Largest number of cache bytes that the generation held, open blocks included, and what ranks
    kept beside them to choose tokens and blocks."""
    kv_bytes_uncompressed: int
    """What the tokens of that moment would take uncompressed."""
    attention_error: float = 0.0
    """What encoding did to attention, measured: the norm of the outputs' difference over the norm
    of the outputs, root mean square over layers and encoded blocks. 0 where none was encoded."""


class PolicySource(StrEnum):
    """Who chose a policy."""

    REQUEST = "request"
    TENANT = "tenant"
    MODEL = "model"
    DEPLOYMENT = "deployment"
    """Nobody: nothing is compressed."""


class Admitted(msgspec.Struct, frozen=True, kw_only=True, tag="admitted"):
    """Always the first event."""

    queue_position: int
    """Requests of the same tenant ahead of this one."""
    estimated_first_token_s: float | None
    policy: str
    """Canonical, and as resolved from a default or a bound."""
    policy_source: PolicySource = PolicySource.DEPLOYMENT
    policy_bound: str = ""
    """The bound that it was chosen for, `auto: ppl<=1%`; empty: it was named."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    phase: Phase
    done_tokens: int
    total_tokens: int
    """0 while the length of the prompt is not known."""
    cached_tokens: int
    estimated_remaining_s: float | None
    """Until the first token; None while there is nothing to estimate from, and after it."""


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(msgspec.Struct, frozen=True, kw_only=True, tag="output"):
    index: int
    """Number of output tokens before this event."""
    text: str
    """May be empty: text is held back while it could be part of a character or a stop string."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class PromptScores(msgspec.Struct, frozen=True, kw_only=True, tag="prompt_scores"):
    """How likely some prompt tokens were, given those before each. In order, without gaps, from
    the second token on."""

    first: int
    """Place of the first of them in the prompt, from 0."""
    logprobs: tuple[float, ...]
    top_token_ids: tuple[int, ...] = ()
    """The likeliest tokens at each place, likeliest first: as many for each as were asked for."""
    top_logprobs: tuple[float, ...] = ()


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """Always the last event."""

    reason: FinishReason
    usage: Usage
    stop_sequence: str = ""
    error_kind: str = ""
    """Class name of the error when reason is ERROR (see `errors`)."""
    error_message: str = ""
    error_metadata: dict[str, str] = {}
    error_retry_after_s: float | None = None
    """When to try again, where the error says so. Like the metadata, only in a call's status."""


Event = Admitted | Progress | PromptScores | Output | Finished


class GenerationEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`sequence` runs 1, 2, 3 … without gaps inside one generation: the cursor for resuming."""

    generation: GenerationId
    sequence: int
    event: Event


class GenerationState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class GenerationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of one generation. Times are Unix seconds."""

    generation: GenerationId
    tenant: TenantId
    state: GenerationState
    last_sequence: int
    usage: Usage
    create_time_s: float
    expire_time_s: float | None
    """Until when its events can be replayed; None while it runs."""


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    generation: GenerationId
    upload: int = 0
    """Which of the generation's uploads this is: 0 is the first, others are retries."""

    @property
    def is_attached(self) -> bool:
        """The request_id was known: no new generation. The caller still checks the prompt by
        sending it: chunks are compared, not run again."""
        return self.upload > 0


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    is_admissible: bool
    reason: str
    """An error reason when not admissible."""
    message: str
    first_token_s: float | None
    total_s: float | None
    kv_bytes: int
    kv_bytes_left: int
    policy: str = ""
    """As in `Admitted`; empty where it is the reason for the refusal."""


class ShardSize(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    node: str
    num_blocks: int
    num_free_blocks: int
    """Those included that are kept for later requests and come free when they are wanted."""


class BackendStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for health, doctor and top."""

    is_ready: bool
    """A token has been generated through the whole ring, and no rank is lost since."""
    detail: str
    model: ModelSpec
    menu: Menu = Menu()
    """What a policy may name."""
    default_policy: Policy = Policy()
    """Of a request that names none, of a tenant without a default."""
    epoch: int
    num_ranks: int
    num_running: int
    num_waiting: int
    ranks: tuple[ShardSize, ...]
    tier_bytes: dict[str, int] = {}
    """Cache memory of each tier that there is, over all ranks, by the tier's name."""


class TierLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant has of one tier of cache memory in an engine now."""

    floor_bytes: int = 0
    """Nobody can take this much from it."""
    limit_bytes: int = UNLIMITED
    used_bytes: int = 0
    """As stored, over all ranks."""
    borrowed_bytes: int = 0
    """The part that is above the floor, in each kind of layers for itself."""
    cached_bytes: int = 0
    """The part that nobody is using, and that is evicted first."""


class TenantLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant uses of an engine now."""

    num_running: int = 0
    num_waiting: int = 0
    kv_bytes: int = 0
    input_tokens: int = 0
    """That count against its tokens a minute, reserved ones included."""
    output_tokens: int = 0
    num_refused: int = 0
    """Requests that a limit of the tenant refused, since the engine started."""
    tiers: dict[str, TierLoad] = {}
    """By the names of `Tier`, those that the engine has."""


class Backend(ContextBackend, CacheBackend, Protocol):
    """An engine as the router calls it. Every method may raise any `KvClusterError`.

    `tenant` comes from the credential, never from a request field. A generation of another
    tenant is `GenerationNotFound`, exactly as one that does not exist.
    """

    async def open(self, request: GenerationRequest) -> Opened:
        """Admit a request. Its first event, `Admitted`, exists when this returns."""
        ...

    async def append_prompt(
        self, generation: GenerationId, upload: int, chunk: PromptChunk
    ) -> None:
        """Add a chunk. Returns when the engine can take the next one: this is the back-pressure.

        `upload` is that of `Opened`. A retry's chunk is compared; it waits for the upload that
        feeds the engine, and takes its place once that one is gone. An upload that is refused is
        over; the generation ends with it when no other upload can complete the prompt.

        Raises: PromptCorrupt (gap, overlap), InvalidField (id outside the vocabulary, text without
        tokenizer), ContextTooLong (as soon as it is known), RequestIdConflict (a retry differs),
        UploadStalled (given up, or another upload took over), or the error that ended the
        generation.
        """
        ...

    async def finish_prompt(self, generation: GenerationId, upload: int) -> None:
        """This upload is complete. Raises: InvalidField when the prompt is empty,
        RequestIdConflict when a retry differs or is shorter, and what `append_prompt` raises."""
        ...

    def watch(
        self, tenant: TenantId, generation: GenerationId, after_sequence: int
    ) -> AsyncIterator[tuple[GenerationEvent, ...]]:
        """Replay the events after `after_sequence`, then follow until `Finished`.

        Closing the iterator detaches the reader; when the last reader of an unfinished generation
        detaches, it is cancelled after its `disconnect_grace_s`.
        Raises: GenerationNotFound, ResumeExpired (after_sequence is beyond the last event).
        """
        ...

    async def fail(
        self, generation: GenerationId, upload: int, error_kind: str, message: str
    ) -> None:
        """An upload broke (stall, corrupt chunk, client gone). The generation ends with this
        error when its prompt is unfinished and no retry is there to complete it."""
        ...

    async def cancel(self, tenant: TenantId, generation: GenerationId) -> GenerationRecord: ...

    async def get(self, tenant: TenantId, generation: GenerationId) -> GenerationRecord: ...

    async def list_generations(self, tenant: TenantId) -> tuple[GenerationRecord, ...]:
        """Newest first."""
        ...

    async def count_tokens(self, model: str, chunk: PromptChunk) -> int: ...

    async def estimate(self, request: GenerationRequest) -> Estimate:
        """Dry run of admission for `request.input_tokens` tokens."""
        ...

    async def tenant_load(self, tenant: TenantId, limits: TenantLimits) -> TenantLoad:
        """What the tenant uses now; `limits` as they are now."""
        ...

    async def apply_shares(self, shares: TenantShares) -> None:
        """Shares of cache memory that hold from now on, for all tenants. Older ones than those that
        hold change nothing."""
        ...

    async def status(self) -> BackendStatus: ...
