"""Answers between the domain and protos, both ways: the router writes what the client reads.

In a client's records `generation` is the resource name, in the router's the id.
"""

import math
from typing import assert_never

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from kvcluster.engine.api import (
    Admitted,
    BackendStatus,
    Estimate,
    Event,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRecord,
    GenerationState,
    Output,
    Phase,
    PolicySource,
    Progress,
    PromptScores,
    TokenLogprob,
    Usage,
)
from kvcluster.errors import KvClusterError
from kvcluster.policy import PlugPoint
from kvcluster.router import names
from kvcluster.router.convert import duration
from kvcluster.router.status import error_of_kind, error_of_reason, is_bug
from kvcluster.rpc.v1 import common_pb2, inference_service_pb2
from kvcluster.types import GenerationId, TenantId

_REASON_PREFIX = "ERROR_REASON_"
_BUG_TEXT = "internal error: the log of this server says more"

_PHASES = {
    Phase.QUEUED: inference_service_pb2.Progress.PHASE_QUEUED,
    Phase.UPLOADING: inference_service_pb2.Progress.PHASE_UPLOADING,
    Phase.PREFILLING: inference_service_pb2.Progress.PHASE_PREFILLING,
    Phase.DECODING: inference_service_pb2.Progress.PHASE_DECODING,
}
_FINISH_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_STATES = {
    GenerationState.QUEUED: inference_service_pb2.Generation.STATE_QUEUED,
    GenerationState.RUNNING: inference_service_pb2.Generation.STATE_RUNNING,
    GenerationState.SUCCEEDED: inference_service_pb2.Generation.STATE_SUCCEEDED,
    GenerationState.FAILED: inference_service_pb2.Generation.STATE_FAILED,
    GenerationState.CANCELLED: inference_service_pb2.Generation.STATE_CANCELLED,
}
_POLICY_SOURCES = {
    PolicySource.REQUEST: inference_service_pb2.POLICY_SOURCE_REQUEST,
    PolicySource.TENANT: inference_service_pb2.POLICY_SOURCE_TENANT,
    PolicySource.MODEL: inference_service_pb2.POLICY_SOURCE_MODEL,
    PolicySource.DEPLOYMENT: inference_service_pb2.POLICY_SOURCE_DEPLOYMENT,
}
_PHASE_OF = {number: phase for phase, number in _PHASES.items()}
_FINISH_REASON_OF = {number: reason for reason, number in _FINISH_REASONS.items()}
_STATE_OF = {number: state for state, number in _STATES.items()}
_POLICY_SOURCE_OF = {number: source for source, number in _POLICY_SOURCES.items()}
_REASON_NAME_OF = {
    number: name.removeprefix(_REASON_PREFIX) for name, number in common_pb2.ErrorReason.items()
}


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a client learns of a model."""

    name: str
    max_context_tokens: int
    kv_bytes_per_token: int
    vocab_size: int
    policy_methods: tuple[str, ...]
    """What a policy may name, with the defaults of every parameter."""
    default_policy: str
    weights_digest: str
    tokenizer_digest: str
    """Empty: it has no tokenizer and takes token ids only."""


def event_to_proto(
    event: GenerationEvent, tenant: TenantId
) -> inference_service_pb2.GenerateResponse:
    response = inference_service_pb2.GenerateResponse(
        generation=names.generation_name(tenant, event.generation), sequence=event.sequence
    )
    match event.event:
        case Admitted() as admitted:
            response.admitted.CopyFrom(_admitted_to_proto(admitted))
        case Progress() as progress:
            response.progress.CopyFrom(_progress_to_proto(progress))
        case PromptScores() as scores:
            response.prompt_scores.CopyFrom(_scores_to_proto(scores))
        case Output() as output:
            response.output.CopyFrom(_output_to_proto(output))
        case Finished() as finished:
            response.finished.CopyFrom(_finished_to_proto(finished))
        case unknown:
            assert_never(unknown)
    return response


def event_from_proto(message: inference_service_pb2.GenerateResponse) -> GenerationEvent | None:
    """The event as a client has it; None for a kind that this version does not know."""
    event: Event
    match message.WhichOneof("event"):
        case "admitted":
            event = _admitted_from_proto(message.admitted)
        case "progress":
            event = _progress_from_proto(message.progress)
        case "prompt_scores":
            event = _scores_from_proto(message.prompt_scores)
        case "output":
            event = _output_from_proto(message.output)
        case "finished":
            event = _finished_from_proto(message.finished)
        case _:
            return None
    return GenerationEvent(
        generation=GenerationId(message.generation), sequence=message.sequence, event=event
    )


def record_to_proto(record: GenerationRecord) -> inference_service_pb2.Generation:
    message = inference_service_pb2.Generation(
        name=names.generation_name(record.tenant, record.generation),
        state=_STATES[record.state],
        last_sequence=record.last_sequence,
        usage=usage_to_proto(record.usage),
        create_time=_timestamp(record.create_time_s),
    )
    if record.expire_time_s is not None:
        message.expire_time.CopyFrom(_timestamp(record.expire_time_s))
    return message


def record_from_proto(message: inference_service_pb2.Generation) -> GenerationRecord:
    """The record as a client has it: `generation` is the resource name."""
    return GenerationRecord(
        generation=GenerationId(message.name),
        tenant=TenantId(message.name.split("/")[1]),
        state=_STATE_OF.get(message.state, GenerationState.RUNNING),
        last_sequence=message.last_sequence,
        usage=usage_from_proto(message.usage),
        create_time_s=_to_seconds(message.create_time),
        expire_time_s=(
            _to_seconds(message.expire_time) if message.HasField("expire_time") else None
        ),
    )


def usage_to_proto(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(
        input_tokens=usage.input_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        output_tokens=usage.output_tokens,
        kv_bytes=usage.kv_bytes,
        kv_bytes_uncompressed=usage.kv_bytes_uncompressed,
        attention_error=usage.attention_error,
    )


def usage_from_proto(message: common_pb2.Usage) -> Usage:
    return Usage(
        input_tokens=message.input_tokens,
        cached_input_tokens=message.cached_input_tokens,
        output_tokens=message.output_tokens,
        kv_bytes=message.kv_bytes,
        kv_bytes_uncompressed=message.kv_bytes_uncompressed,
        attention_error=message.attention_error,
    )


def estimate_to_proto(estimate: Estimate) -> inference_service_pb2.EstimateGenerationResponse:
    message = inference_service_pb2.EstimateGenerationResponse(
        admissible=estimate.is_admissible,
        first_token=_optional_duration(estimate.first_token_s),
        total=_optional_duration(estimate.total_s),
        kv_bytes=estimate.kv_bytes,
        kv_bytes_left=estimate.kv_bytes_left,
        policy=estimate.policy,
    )
    if not estimate.is_admissible:
        message.refusal.CopyFrom(error_to_proto(error_of_reason(estimate.reason, estimate.message)))
    return message


def estimate_from_proto(message: inference_service_pb2.EstimateGenerationResponse) -> Estimate:
    return Estimate(
        is_admissible=message.admissible,
        reason="" if message.admissible else error_from_proto(message.refusal).reason,
        message=message.refusal.message,
        first_token_s=(
            _to_seconds(message.first_token) if message.HasField("first_token") else None
        ),
        total_s=_to_seconds(message.total) if message.HasField("total") else None,
        kv_bytes=message.kv_bytes,
        kv_bytes_left=message.kv_bytes_left,
        policy=message.policy,
    )


def model_to_proto(status: BackendStatus) -> inference_service_pb2.Model:
    spec, menu = status.model, status.menu
    return inference_service_pb2.Model(
        name=names.model_name(spec.name),
        max_context_tokens=spec.max_context_tokens,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        vocab_size=spec.vocab_size,
        weights_digest=spec.weights_digest,
        tokenizer_digest=spec.tokenizer_digest,
        policy_methods=[str(method) for plug_point in PlugPoint for method in menu.at(plug_point)],
        default_policy=str(status.default_policy),
    )


def model_from_proto(message: inference_service_pb2.Model) -> ServedModel:
    return ServedModel(
        name=message.name.removeprefix("models/"),
        max_context_tokens=message.max_context_tokens,
        kv_bytes_per_token=message.kv_bytes_per_token,
        vocab_size=message.vocab_size,
        weights_digest=message.weights_digest,
        tokenizer_digest=message.tokenizer_digest,
        policy_methods=tuple(message.policy_methods),
        default_policy=message.default_policy,
    )


def error_to_proto(error: KvClusterError) -> common_pb2.Error:
    name = _REASON_PREFIX + ("INTERNAL" if is_bug(error) else error.reason)
    message = _BUG_TEXT if is_bug(error) else error.message
    return common_pb2.Error(reason=common_pb2.ErrorReason.Value(name), message=message)


def error_from_proto(message: common_pb2.Error) -> KvClusterError:
    return error_of_reason(_REASON_NAME_OF.get(message.reason, ""), message.message)


def _admitted_to_proto(event: Admitted) -> inference_service_pb2.Admitted:
    return inference_service_pb2.Admitted(
        queue_position=event.queue_position,
        estimated_first_token=_optional_duration(event.estimated_first_token_s),
        policy=event.policy,
        policy_source=_POLICY_SOURCES[event.policy_source],
        policy_bound=event.policy_bound,
    )


def _admitted_from_proto(message: inference_service_pb2.Admitted) -> Admitted:
    return Admitted(
        queue_position=message.queue_position,
        estimated_first_token_s=(
            _to_seconds(message.estimated_first_token)
            if message.HasField("estimated_first_token")
            else None
        ),
        policy=message.policy,
        policy_source=_POLICY_SOURCE_OF.get(message.policy_source, PolicySource.DEPLOYMENT),
        policy_bound=message.policy_bound,
    )


def _progress_to_proto(event: Progress) -> inference_service_pb2.Progress:
    return inference_service_pb2.Progress(
        phase=_PHASES[event.phase],
        done_tokens=event.done_tokens,
        total_tokens=event.total_tokens,
        cached_tokens=event.cached_tokens,
        estimated_remaining=_optional_duration(event.estimated_remaining_s),
    )


def _progress_from_proto(message: inference_service_pb2.Progress) -> Progress:
    return Progress(
        phase=_PHASE_OF.get(message.phase, Phase.QUEUED),
        done_tokens=message.done_tokens,
        total_tokens=message.total_tokens,
        cached_tokens=message.cached_tokens,
        estimated_remaining_s=(
            _to_seconds(message.estimated_remaining)
            if message.HasField("estimated_remaining")
            else None
        ),
    )


def _scores_to_proto(event: PromptScores) -> inference_service_pb2.PromptScores:
    return inference_service_pb2.PromptScores(
        first=event.first,
        logprobs=event.logprobs,
        top_token_ids=event.top_token_ids,
        top_logprobs=event.top_logprobs,
    )


def _scores_from_proto(message: inference_service_pb2.PromptScores) -> PromptScores:
    return PromptScores(
        first=message.first,
        logprobs=tuple(message.logprobs),
        top_token_ids=tuple(message.top_token_ids),
        top_logprobs=tuple(message.top_logprobs),
    )


def _output_to_proto(event: Output) -> inference_service_pb2.OutputChunk:
    return inference_service_pb2.OutputChunk(
        index=event.index,
        text=event.text,
        token_ids=event.token_ids,
        logprobs=[
            inference_service_pb2.TokenLogprob(
                token_id=entry.token_id,
                logprob=entry.logprob,
                top=[
                    inference_service_pb2.RankedToken(token_id=token_id, logprob=logprob)
                    for token_id, logprob in entry.top
                ],
            )
            for entry in event.logprobs
        ],
    )


def _output_from_proto(message: inference_service_pb2.OutputChunk) -> Output:
    return Output(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(
            TokenLogprob(
                token_id=entry.token_id,
                logprob=entry.logprob,
                top=tuple((ranked.token_id, ranked.logprob) for ranked in entry.top),
            )
            for entry in message.logprobs
        ),
    )


def _finished_to_proto(event: Finished) -> inference_service_pb2.Finished:
    message = inference_service_pb2.Finished(
        reason=_FINISH_REASONS[event.reason],
        usage=usage_to_proto(event.usage),
        stop_sequence=event.stop_sequence,
    )
    if event.reason is FinishReason.ERROR:
        message.error.CopyFrom(error_to_proto(error_of_kind(event.error_kind, event.error_message)))
    return message


def _finished_from_proto(message: inference_service_pb2.Finished) -> Finished:
    has_error = message.HasField("error")
    return Finished(
        reason=_FINISH_REASON_OF.get(message.reason, FinishReason.ERROR),
        usage=usage_from_proto(message.usage),
        stop_sequence=message.stop_sequence,
        error_kind=type(error_from_proto(message.error)).__name__ if has_error else "",
        error_message=message.error.message,
    )


def _optional_duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else duration(seconds)


def _to_seconds(message: Duration | Timestamp) -> float:
    return message.seconds + message.nanos / 1e9


def _timestamp(unix_s: float) -> Timestamp:
    # Split first: a float of nanoseconds since 1970 is off by more than a hundred of them.
    fraction, whole = math.modf(unix_s)
    return Timestamp(seconds=int(whole), nanos=int(fraction * 1e9))
