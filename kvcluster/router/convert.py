"""Requests between protos and the domain, both ways: the client writes what the router reads.

The form of fields is checked here; which values make sense is for the engine to decide.
"""

import re
import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
from google.protobuf.duration_pb2 import Duration

from kvcluster.engine.api import (
    CacheMode,
    GenerationRequest,
    PromptChunk,
    TextChunk,
    TokenChunk,
)
from kvcluster.errors import InvalidField
from kvcluster.router import names
from kvcluster.router.policy import policy_from_proto
from kvcluster.rpc.v1 import common_pb2, inference_service_pb2
from kvcluster.types import SamplingParams, TenantId

BYTES_PER_ID = 4
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{0,128}")
_MAX_PRIORITY = 100
_DEFAULT_PROGRESS_S = 1.0
_MAX_DURATION_S = 3600.0
_MAX_NAMESPACE_CHARS = 128
_MODES = {
    mode: inference_service_pb2.PrefixCache.Mode.Value(f"MODE_{mode.name}") for mode in CacheMode
}
_MODE_OF = {number: mode for mode, number in _MODES.items()}


class PromptPart(NamedTuple):
    """A chunk, with the bytes that its checksum covers."""

    chunk: PromptChunk
    raw: bytes

    @property
    def end(self) -> int:
        """The offset that the next chunk must have."""
        is_text = isinstance(self.chunk, TextChunk)
        return self.chunk.offset + len(self.raw) // (1 if is_text else BYTES_PER_ID)


def request_from_proto(
    message: inference_service_pb2.GenerateRequest,
    *,
    tenant: TenantId,
    model: str,
    deadline_s: float | None,
) -> GenerationRequest:
    """The request, for `model` as resolved. Raises InvalidField for a field of the wrong form."""
    if not _REQUEST_ID.fullmatch(message.request_id):
        raise InvalidField("request_id", "want at most 128 of the characters A-Z a-z 0-9 . _ : -")
    if len(message.prefix_cache.namespace) > _MAX_NAMESPACE_CHARS:
        raise InvalidField(
            "prefix_cache.namespace", f"want at most {_MAX_NAMESPACE_CHARS} characters"
        )
    if message.priority > _MAX_PRIORITY:
        raise InvalidField("priority", f"want 0 to {_MAX_PRIORITY}, got {message.priority}")
    progress_s = _seconds("progress_interval", message.progress_interval)
    grace_s = _seconds("disconnect_grace", message.disconnect_grace)
    return GenerationRequest(
        tenant=tenant,
        model=model,
        max_output_tokens=message.max_output_tokens,
        sampling=sampling_from_proto(message.sampling),
        policy=policy_from_proto(message),
        request_id=message.request_id,
        input_tokens=message.input_tokens if message.HasField("input_tokens") else None,
        deadline_s=deadline_s,
        progress_interval_s=progress_s or _DEFAULT_PROGRESS_S,
        disconnect_grace_s=grace_s,
        priority=message.priority,
        context=names.context_of(message.context, tenant, field="context")
        if message.context
        else "",
        cache_mode=_MODE_OF.get(message.prefix_cache.mode, CacheMode.READ_WRITE),
        cache_namespace=message.prefix_cache.namespace,
    )


def request_to_proto(request: GenerationRequest) -> inference_service_pb2.GenerateRequest:
    """The `setup` of an upload. Tenant and deadline travel with the call, not in it.

    Raises: InvalidField for a number that its field cannot hold.
    """
    sampling = sampling_to_proto(request.sampling)
    try:
        message = inference_service_pb2.GenerateRequest(
            model=request.model,
            max_output_tokens=request.max_output_tokens,
            sampling=sampling,
            policy=request.policy,
            request_id=request.request_id,
            input_tokens=request.input_tokens,
            progress_interval=duration(request.progress_interval_s),
            priority=request.priority,
        )
    except ValueError as error:
        raise InvalidField("options", str(error)) from error
    message.context = request.context
    if request.cache_mode is not CacheMode.READ_WRITE or request.cache_namespace:
        message.prefix_cache.mode = _MODES[request.cache_mode]
        message.prefix_cache.namespace = request.cache_namespace
    if request.disconnect_grace_s:
        message.disconnect_grace.CopyFrom(duration(request.disconnect_grace_s))
    return message


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    given = {field.name for field, _ in message.ListFields()}
    default = SamplingParams()
    return SamplingParams(
        temperature=message.temperature if "temperature" in given else default.temperature,
        top_p=message.top_p if "top_p" in given else default.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=(
            message.repetition_penalty
            if "repetition_penalty" in given
            else default.repetition_penalty
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if "logprobs" in given else None,
        prompt_logprobs=message.prompt_logprobs if "prompt_logprobs" in given else None,
        min_output_tokens=message.min_output_tokens,
        ignore_eos=message.ignore_eos,
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


def sampling_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    """Raises InvalidField for a number that its field cannot hold."""
    try:
        return common_pb2.SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=params.seed,
            stop=params.stop,
            stop_token_ids=params.stop_token_ids,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            min_output_tokens=params.min_output_tokens,
            ignore_eos=params.ignore_eos,
            logit_bias=dict(params.logit_bias),
        )
    except (ValueError, TypeError) as error:
        raise InvalidField("sampling", str(error)) from error


def part_from_proto(message: common_pb2.TokenInput, *, field: str, offset: int = 0) -> PromptPart:
    """A part of a prompt. Raises InvalidField when it is empty or holds part of an id."""
    match message.WhichOneof("input"):
        case "text":
            part = PromptPart(TextChunk(offset, message.text), message.text.encode())
        case "packed_ids":
            part = token_part(offset, message.packed_ids, field=f"{field}.packed_ids")
        case "ids":
            part = token_part(offset, pack_ids(message.ids.ids), field=f"{field}.ids")
        case _:
            raise InvalidField(field, "is missing: set text, packed_ids or ids")
    if not part.raw:
        raise InvalidField(field, "is empty: leave the chunk out")
    return part


def text_part(offset: int, text: str) -> PromptPart:
    """Raises InvalidField for text that has no UTF-8 form (lone surrogates)."""
    try:
        return PromptPart(TextChunk(offset, text), text.encode())
    except UnicodeEncodeError as error:
        raise InvalidField("prompt", f"cannot be written as UTF-8: {error.reason}") from error


def token_part(offset: int, packed_ids: bytes, *, field: str) -> PromptPart:
    """Raises InvalidField when `packed_ids` does not end with a whole id."""
    if len(packed_ids) % BYTES_PER_ID:
        raise InvalidField(field, f"want {BYTES_PER_ID} bytes per token id, got {len(packed_ids)}")
    return PromptPart(TokenChunk(offset, packed_ids), packed_ids)


def part_to_proto(part: PromptPart) -> inference_service_pb2.PromptChunk:
    """The chunk with its checksum."""
    return inference_service_pb2.PromptChunk(
        offset=part.chunk.offset, input=input_to_proto(part), crc32c=checksum(part.raw)
    )


def input_to_proto(part: PromptPart) -> common_pb2.TokenInput:
    if isinstance(part.chunk, TextChunk):
        return common_pb2.TokenInput(text=part.chunk.text)
    return common_pb2.TokenInput(packed_ids=part.raw)


def pack_ids(ids: Sequence[int]) -> bytes:
    """Little-endian u32 bytes. Raises InvalidField for a number that is no u32."""
    try:
        packed = array("I", ids)
    except (OverflowError, TypeError) as error:
        raise InvalidField("prompt_ids", "want token ids from 0 to 4294967295") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def checksum(raw: bytes) -> int:
    return int(google_crc32c.value(raw))


def duration(seconds: float) -> Duration:
    """Raises InvalidField for what no Duration can hold (NaN, infinity, ten thousand years)."""
    message = Duration()
    try:
        message.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError) as error:
        raise InvalidField("duration", f"want seconds, got {seconds}") from error
    return message


def _seconds(field: str, message: Duration) -> float:
    seconds = message.seconds + message.nanos / 1e9
    if not 0 <= seconds <= _MAX_DURATION_S:
        raise InvalidField(field, f"want 0 to {_MAX_DURATION_S:.0f} s, got {seconds}")
    return seconds
