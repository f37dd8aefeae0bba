"""Accept a request or refuse it with a reason, before anything is allocated for it."""

import math
from dataclasses import dataclass

from kvcluster.cache.partition import Partition
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import GenerationRequest
from kvcluster.engine.footprint import footprint
from kvcluster.errors import (
    ClusterOverloaded,
    ContextTooLong,
    DeadlineInfeasible,
    InvalidField,
    ModelNotFound,
    QuotaExceeded,
)
from kvcluster.types import ModelSpec, Policy, SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
MAX_PRIORITY = 100
MAX_REQUEST_ID_CHARS = 128
MAX_DISCONNECT_GRACE_S = 3_600.0
MIN_PROGRESS_INTERVAL_S = 0.01
MAX_PROGRESS_INTERVAL_S = 3600.0


@dataclass(frozen=True, slots=True)
class Load:
    """What admission must know of the engine's present state."""

    num_requests: int
    """Waiting and running."""
    first_token_s: float | None
    """Estimate for the new request; None while there is nothing to estimate from."""
    retry_after_s: float
    """When a place in the queue is likely to be free."""


def check(request: GenerationRequest, spec: ModelSpec) -> None:
    """Check all that can be wrong with the request by itself.

    Raises: ModelNotFound, InvalidField, ContextTooLong.
    """
    if request.model != spec.name:
        raise ModelNotFound(f"model {request.model!r} is not served here; {spec.name!r} is")
    check_sampling(request.sampling, spec)
    _require("max_output_tokens", "want at least 1", met=request.max_output_tokens >= 1)
    _require("priority", f"want 0 to {MAX_PRIORITY}", met=0 <= request.priority <= MAX_PRIORITY)
    _require(
        "request_id",
        f"want at most {MAX_REQUEST_ID_CHARS} characters",
        met=len(request.request_id) <= MAX_REQUEST_ID_CHARS,
    )
    _require(
        "progress_interval",
        f"want {MIN_PROGRESS_INTERVAL_S} to {MAX_PROGRESS_INTERVAL_S} seconds",
        met=MIN_PROGRESS_INTERVAL_S <= request.progress_interval_s <= MAX_PROGRESS_INTERVAL_S,
    )
    _require(
        "disconnect_grace",
        f"want 0 to {MAX_DISCONNECT_GRACE_S} seconds",
        met=0 <= request.disconnect_grace_s <= MAX_DISCONNECT_GRACE_S,
    )
    if request.deadline_s is not None:
        _require("deadline", "want a finite number", met=math.isfinite(request.deadline_s))
    if request.input_tokens is not None:
        _require("input_tokens", "want at least 1", met=request.input_tokens >= 1)
    check_context(request, spec, num_prompt_tokens=request.input_tokens or 1, is_complete=False)


def check_context(
    request: GenerationRequest, spec: ModelSpec, *, num_prompt_tokens: int, is_complete: bool
) -> None:
    """Raises: ContextTooLong when a prompt of (at least) so many tokens leaves too little room in
    the model's context or in what the tenant may use of it."""
    num_tokens = num_prompt_tokens + request.max_output_tokens
    limit_tokens = min(spec.max_context_tokens, request.limits.max_context_tokens)
    if num_tokens > limit_tokens:
        raise ContextTooLong(
            num_tokens=num_tokens,
            limit_tokens=limit_tokens,
            is_lower_bound=not is_complete and request.input_tokens is None,
        )


def check_capacity(
    request: GenerationRequest,
    spec: ModelSpec,
    *,
    cache: CacheConfig,
    partition: Partition,
    num_prompt_tokens: int,
    policy: Policy,
) -> None:
    """Raises: QuotaExceeded when the tenant's share could not hold the request even when empty."""
    # The last output token is never fed back, so it needs no slot.
    num_tokens = num_prompt_tokens + request.max_output_tokens - 1
    needed = footprint(
        policy,
        spec,
        num_tokens,
        partition,
        block_size=cache.block_size,
        chunk_tokens=cache.block_size,
    ).blocks
    capacity = partition.capacity(policy.storage)
    short = next((group for group, count in enumerate(needed) if count > capacity[group]), None)
    if short is None:
        return
    raise QuotaExceeded(
        f"tenant {partition.tenant} needs {needed[short]} cache blocks of {cache.block_size} "
        f"tokens for prompt and output, its partition has {capacity[short]}: shorten the prompt "
        "or max_output_tokens",
        metadata={
            "quota": "partitions.gpu",
            "used_bytes": str(partition.use().used_bytes),
            "needed_blocks": str(needed[short]),
            "limit_blocks": str(capacity[short]),
            "block_size": str(cache.block_size),
        },
    )


def without_block(partition: Partition, *, num_tokens: int) -> QuotaExceeded:
    """Why a request that was admitted is given up: what its tenant may have is no longer enough for
    so many tokens."""
    capacity, used = partition.capacity(), partition.use().used_bytes
    return QuotaExceeded(
        f"request of {num_tokens} tokens got no cache block even alone; the tenant uses {used} "
        f"bytes and may have {capacity} blocks per KV group: shorten the prompt",
        metadata={
            "quota": "partitions.gpu",
            "used_bytes": str(used),
            "limit_blocks": str(min(capacity)),
        },
    )


def check_load(request: GenerationRequest, config: EngineConfig, load: Load) -> None:
    """Check what may be different a moment later.

    Raises: ClusterOverloaded with `retry_after_s`, DeadlineInfeasible.
    """
    if load.num_requests >= config.max_running + config.max_waiting:
        raise ClusterOverloaded(
            f"{load.num_requests} requests are running or queued already: try again in "
            f"{load.retry_after_s:.0f} s",
            retry_after_s=load.retry_after_s,
        )
    if request.deadline_s is None:
        return
    if request.deadline_s <= (load.first_token_s or 0.0):
        raise DeadlineInfeasible(
            f"the first token is expected in {load.first_token_s or 0.0:.1f} s, the deadline is "
            f"in {request.deadline_s:.1f} s: allow more time"
        )


def check_sampling(sampling: SamplingParams, spec: ModelSpec) -> None:
    """Raises: InvalidField. Every comparison is written so that NaN fails it."""
    _require(
        "sampling.temperature",
        "want a finite number >= 0",
        met=0 <= sampling.temperature < math.inf,
    )
    _require("sampling.top_p", "want more than 0, at most 1", met=0 < sampling.top_p <= 1)
    _require("sampling.top_k", "want 0 (no limit) or more", met=sampling.top_k >= 0)
    _require("sampling.min_p", "want 0 or more, less than 1", met=0 <= sampling.min_p < 1)
    _require(
        "sampling.repetition_penalty",
        "want a finite number > 0",
        met=0 < sampling.repetition_penalty < math.inf,
    )
    _require("sampling.presence_penalty", "want -2 to 2", met=-2 <= sampling.presence_penalty <= 2)
    _require(
        "sampling.frequency_penalty", "want -2 to 2", met=-2 <= sampling.frequency_penalty <= 2
    )
    _require("sampling.seed", "want 0 to 2**64 - 1", met=0 <= sampling.seed < 2**64)
    _require("sampling.min_output_tokens", "want 0 or more", met=sampling.min_output_tokens >= 0)
    for name in ("logprobs", "prompt_logprobs"):
        number = getattr(sampling, name)
        _require(
            f"sampling.{name}",
            f"want 0 to {MAX_LOGPROBS}",
            met=number is None or 0 <= number <= MAX_LOGPROBS,
        )
    _check_stop(sampling, spec)
    _check_logit_bias(sampling, spec)


def _check_stop(sampling: SamplingParams, spec: ModelSpec) -> None:
    if sampling.stop:
        _require("sampling.stop", "this model has no tokenizer, so no text", met=spec.has_tokenizer)
    _require(
        "sampling.stop",
        f"want at most {MAX_STOP_STRINGS} strings",
        met=len(sampling.stop) <= MAX_STOP_STRINGS,
    )
    _require(
        "sampling.stop",
        f"want strings of 1 to {MAX_STOP_STRING_CHARS} characters",
        met=all(1 <= len(word) <= MAX_STOP_STRING_CHARS for word in sampling.stop),
    )
    _require(
        "sampling.stop_token_ids",
        f"want at most {MAX_STOP_TOKEN_IDS} ids",
        met=len(sampling.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
    )
    _require(
        "sampling.stop_token_ids",
        f"want ids of the vocabulary, 0 to {spec.vocab_size - 1}",
        met=all(0 <= token_id < spec.vocab_size for token_id in sampling.stop_token_ids),
    )


def _check_logit_bias(sampling: SamplingParams, spec: ModelSpec) -> None:
    _require(
        "sampling.logit_bias",
        f"want at most {MAX_LOGIT_BIASES} entries",
        met=len(sampling.logit_bias) <= MAX_LOGIT_BIASES,
    )
    for token_id, bias in sampling.logit_bias:
        _require(
            "sampling.logit_bias",
            f"want ids of the vocabulary, 0 to {spec.vocab_size - 1}",
            met=0 <= token_id < spec.vocab_size,
        )
        _require(
            "sampling.logit_bias",
            f"want biases from -{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}",
            met=-MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS,
        )


def _require(field: str, rule: str, *, met: bool) -> None:
    if not met:
        raise InvalidField(field, rule)
