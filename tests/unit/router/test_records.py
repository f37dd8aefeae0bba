"""Answers survive the way through their protos."""

import pytest

from kvcluster.engine.api import (
    Admitted,
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
from kvcluster.router import records
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.types import GenerationId, TenantId
from tests.unit.router.fake_backend import FakeBackend

RED = TenantId("red")
NAME = "tenants/red/generations/g1"
USAGE = Usage(
    input_tokens=5,
    cached_input_tokens=2,
    output_tokens=3,
    kv_bytes=2**40,
    kv_bytes_uncompressed=2**41,
    attention_error=0.125,
)


def progress(phase: Phase, remaining_s: float | None) -> Progress:
    return Progress(
        phase=phase,
        done_tokens=1,
        total_tokens=2**33,
        cached_tokens=0,
        estimated_remaining_s=remaining_s,
    )


EVENTS: list[Event] = [
    Admitted(queue_position=3, estimated_first_token_s=1.25, policy="exact"),
    *(
        Admitted(queue_position=0, estimated_first_token_s=None, policy="", policy_source=source)
        for source in PolicySource
    ),
    Admitted(
        queue_position=0,
        estimated_first_token_s=None,
        policy="int4",
        policy_source=PolicySource.REQUEST,
        policy_bound="auto: ppl<=1%",
    ),
    *(progress(phase, None) for phase in Phase),
    progress(Phase.PREFILLING, 0.0),
    PromptScores(first=1, logprobs=(-0.5, -2.0)),
    PromptScores(first=9, logprobs=(-0.5,), top_token_ids=(3, 2**31), top_logprobs=(-0.25, -4.0)),
    Output(index=0, text="", token_ids=()),
    Output(
        index=7,
        text="hé",
        token_ids=(1, 2**31),
        logprobs=(TokenLogprob(token_id=1, logprob=-0.1, top=((1, -0.1), (2, -2.5))),),
    ),
    *(Finished(reason=reason, usage=USAGE) for reason in FinishReason if reason != "error"),
    Finished(reason=FinishReason.STOP, usage=USAGE, stop_sequence="\n"),
    Finished(
        reason=FinishReason.ERROR, usage=USAGE, error_kind="RankLost", error_message="try again"
    ),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_under_its_resource_name(event: Event) -> None:
    sent = GenerationEvent(generation=GenerationId("g1"), sequence=9, event=event)
    raw = records.event_to_proto(sent, RED).SerializeToString()

    received = records.event_from_proto(pb.GenerateResponse.FromString(raw))

    assert received == GenerationEvent(generation=GenerationId(NAME), sequence=9, event=event)


def test_an_event_of_a_later_server_is_left_out() -> None:
    assert records.event_from_proto(pb.GenerateResponse(sequence=1)) is None


def test_a_bug_in_the_engine_is_not_quoted_to_the_client() -> None:
    finished = Finished(
        reason=FinishReason.ERROR, usage=USAGE, error_kind="KeyError", error_message="'secret'"
    )
    event = GenerationEvent(generation=GenerationId("g1"), sequence=1, event=finished)

    assert b"secret" not in records.event_to_proto(event, RED).SerializeToString()


@pytest.mark.parametrize("state", GenerationState)
@pytest.mark.parametrize("expire_time_s", [None, 1_700_000_600.25])
def test_a_record_comes_back_under_its_resource_name(
    state: GenerationState, expire_time_s: float | None
) -> None:
    sent = GenerationRecord(
        generation=GenerationId("g1"),
        tenant=RED,
        state=state,
        last_sequence=4,
        usage=USAGE,
        create_time_s=1_700_000_000.5,
        expire_time_s=expire_time_s,
    )

    received = records.record_from_proto(records.record_to_proto(sent))

    assert received.generation == NAME
    assert [getattr(received, name) for name in received.__struct_fields__[1:]] == [
        getattr(sent, name) for name in sent.__struct_fields__[1:]
    ]


@pytest.mark.parametrize("reason", ["", "CLUSTER_OVERLOADED"])
def test_an_estimate_comes_back(reason: str) -> None:
    sent = Estimate(
        is_admissible=not reason,
        reason=reason,
        message="too much is waiting" if reason else "",
        first_token_s=None,
        total_s=3.5,
        kv_bytes=7,
        kv_bytes_left=8,
        policy="int4",
    )

    assert records.estimate_from_proto(records.estimate_to_proto(sent)) == sent


async def test_a_model_comes_back_as_what_a_client_may_know_of_it() -> None:
    status = await FakeBackend().status()
    spec = status.model

    model = records.model_from_proto(records.model_to_proto(status))

    assert (model.name, model.vocab_size) == ("echo", spec.vocab_size)
    assert model.kv_bytes_per_token == spec.kv_bytes_per_token
    assert model.max_context_tokens == spec.max_context_tokens
    assert model.default_policy == "exact"
    assert model.policy_methods == ("own", "exact", "int4", "full", "window:size=4096", "all")
