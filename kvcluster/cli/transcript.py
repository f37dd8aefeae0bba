"""What one generation gave: its text, tokens, usage and times, gathered from its events."""

from collections.abc import Callable

import msgspec

from kvcluster.engine.api import (
    Admitted,
    Finished,
    FinishReason,
    GenerationEvent,
    Output,
    PolicySource,
    Usage,
)
from kvcluster.errors import ErrorRecord, KvClusterError, from_record


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """As the client saw them, upload and network included."""

    time_to_first_token_s: float | None
    total_s: float
    output_tokens_per_s: float | None
    """From the first token's arrival to the last one's; None with fewer than two arrivals."""


class GenerateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvcluster generate --json` prints."""

    generation: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_sequence: str
    usage: Usage
    policy: str
    policy_source: PolicySource
    policy_bound: str
    timings: Timings


class Transcript:
    """Collects the events of one generation, in order. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_s = clock()
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None
        self._num_first_tokens = 0
        self._generation = ""
        self._admitted = Admitted(queue_position=0, estimated_first_token_s=None, policy="")
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finished: Finished | None = None
        self._finished_s = self._started_s

    def add(self, received: GenerationEvent) -> None:
        match received.event:
            case Admitted() as admitted:
                self._generation, self._admitted = received.generation, admitted
            case Output() as output:
                self._texts.append(output.text)
                self._token_ids.extend(output.token_ids)
                if output.token_ids:
                    self._mark_arrival(len(output.token_ids))
            case Finished() as finished:
                self._finished = finished
                self._finished_s = self._clock()

    def report(self) -> GenerateReport:
        """The whole of an ended generation, however it ended.

        Raises: the error that ended it, KvClusterError when it never ended.
        """
        finished = self._finished
        if finished is None:
            raise KvClusterError("the server closed the stream before the generation finished")
        if finished.reason is FinishReason.ERROR:
            raise from_record(
                ErrorRecord(kind=finished.error_kind, message=finished.error_message, metadata={})
            )
        return GenerateReport(
            generation=self._generation,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=finished.reason,
            stop_sequence=finished.stop_sequence,
            usage=finished.usage,
            policy=self._admitted.policy,
            policy_source=self._admitted.policy_source,
            policy_bound=self._admitted.policy_bound,
            timings=self._timings(),
        )

    def _mark_arrival(self, num_tokens: int) -> None:
        self._last_token_s = self._clock()
        if self._first_token_s is None:
            self._first_token_s = self._last_token_s
            self._num_first_tokens = num_tokens

    def _timings(self) -> Timings:
        first_s, last_s = self._first_token_s, self._last_token_s
        speed = None
        if first_s is not None and last_s is not None and last_s > first_s:
            speed = (len(self._token_ids) - self._num_first_tokens) / (last_s - first_s)
        return Timings(
            time_to_first_token_s=None if first_s is None else first_s - self._started_s,
            total_s=self._finished_s - self._started_s,
            output_tokens_per_s=speed,
        )
