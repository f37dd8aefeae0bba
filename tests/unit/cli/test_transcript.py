import pytest

from kvcluster.cli.transcript import Transcript
from kvcluster.engine.api import (
    Admitted,
    Event,
    Finished,
    FinishReason,
    GenerationEvent,
    Output,
    PolicySource,
    Usage,
)
from kvcluster.errors import KvClusterError, RankLost
from kvcluster.types import GenerationId

USAGE = Usage(
    input_tokens=7,
    cached_input_tokens=0,
    output_tokens=3,
    kv_bytes=640,
    kv_bytes_uncompressed=640,
)
ADMITTED = Admitted(
    queue_position=0,
    estimated_first_token_s=None,
    policy="exact",
    policy_source=PolicySource.TENANT,
    policy_bound="auto: ppl<=1%",
)


class Clock:
    """Seconds that a test moves by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def transcript(clock: Clock) -> Transcript:
    return Transcript(clock)


def received(event: Event) -> GenerationEvent:
    return GenerationEvent(generation=GenerationId("g1"), sequence=1, event=event)


def output(text: str, *token_ids: int) -> Output:
    return Output(index=0, text=text, token_ids=token_ids)


def finished(reason: FinishReason = FinishReason.STOP) -> Finished:
    return Finished(reason=reason, usage=USAGE, stop_sequence="\n")


def test_text_and_tokens_of_all_outputs_are_joined(transcript: Transcript) -> None:
    for event in (ADMITTED, output("a", 1), output("bc", 2, 3), finished()):
        transcript.add(received(event))

    report = transcript.report()

    assert (report.text, report.token_ids) == ("abc", (1, 2, 3))
    assert (report.generation, report.policy) == ("g1", "exact")
    assert (report.policy_source, report.policy_bound) == ("tenant", "auto: ppl<=1%")
    assert (report.finish_reason, report.stop_sequence) == (FinishReason.STOP, "\n")
    assert report.usage == USAGE


def test_times_are_those_at_which_tokens_arrived(transcript: Transcript, clock: Clock) -> None:
    transcript.add(received(ADMITTED))
    clock.now_s = 102.0
    transcript.add(received(output("", 1)))
    clock.now_s = 104.0
    transcript.add(received(output("abc", 2, 3)))
    clock.now_s = 105.0
    transcript.add(received(finished()))

    timings = transcript.report().timings

    assert (timings.time_to_first_token_s, timings.total_s) == (2.0, 5.0)
    assert timings.output_tokens_per_s == 1.0


def test_one_arrival_gives_no_speed(transcript: Transcript) -> None:
    for event in (ADMITTED, output("a", 1), finished()):
        transcript.add(received(event))

    assert transcript.report().timings.output_tokens_per_s is None


def test_a_generation_without_a_token_has_no_first_token_time(transcript: Transcript) -> None:
    transcript.add(received(ADMITTED))
    transcript.add(received(finished(FinishReason.CANCELLED)))

    report = transcript.report()

    assert report.timings.time_to_first_token_s is None
    assert report.finish_reason is FinishReason.CANCELLED


def test_the_error_that_ended_a_generation_is_raised_with_its_class(
    transcript: Transcript,
) -> None:
    error = Finished(
        reason=FinishReason.ERROR,
        usage=USAGE,
        error_kind="RankLost",
        error_message="rank 2 missed its deadline",
    )
    transcript.add(received(error))

    with pytest.raises(RankLost, match="rank 2 missed its deadline"):
        transcript.report()


def test_a_stream_that_ends_before_finished_is_an_error(transcript: Transcript) -> None:
    transcript.add(received(ADMITTED))

    with pytest.raises(KvClusterError, match="before the generation finished"):
        transcript.report()
