"""One generation as its client sees it: the request, its events, its text and its timers."""

import math
from collections.abc import Sequence
from itertools import chain

from kvcluster.engine.api import (
    FinishReason,
    GenerationRecord,
    GenerationState,
    Output,
    Phase,
    PromptScores,
    TokenLogprob,
    Usage,
)
from kvcluster.engine.plan import SampledToken, ScoredTokens
from kvcluster.engine.request import Request, RequestState
from kvcluster.engine.stream import EventLog, OutputText, Signal
from kvcluster.errors import (
    DeadlineExceeded,
    GenerationNotFound,
    KvClusterError,
)
from kvcluster.types import GenerationId, ModelSpec, TenantId

UNWATCHED_GRACE_S = 60.0
"""How long a generation may wait for its first reader: a front door that dies between opening and
watching must not leave blocks behind."""

_STATES = {
    FinishReason.STOP: GenerationState.SUCCEEDED,
    FinishReason.LENGTH: GenerationState.SUCCEEDED,
    FinishReason.CANCELLED: GenerationState.CANCELLED,
    FinishReason.DEADLINE: GenerationState.FAILED,
    FinishReason.ERROR: GenerationState.FAILED,
}


class Generation:
    """Mutable record of one generation. `now` values are of the engine's monotonic clock."""

    def __init__(
        self, request: Request, text: OutputText, model: ModelSpec, *, now: float, unix_s: float
    ) -> None:
        spec = request.spec
        self.id: GenerationId = request.generation
        self.tenant: TenantId = spec.tenant
        self.request = request
        self.log = EventLog(self.id)
        self.text = text
        self.room = Signal()
        """Notified when more of the prompt may be taken, and at the end."""
        self.error: KvClusterError | None = None
        """What ended the generation, when that was an error."""
        self.create_time_s = unix_s
        self.expire_time_s: float | None = None
        self.expires_at = math.inf
        self.deadline_at = math.inf if spec.deadline_s is None else now + spec.deadline_s
        self.progress_at = now + spec.progress_interval_s
        self.num_readers = 0
        self.abandoned_at = now + max(spec.disconnect_grace_s, UNWATCHED_GRACE_S)
        """When it ends for want of readers; infinite while there is one."""
        self._model = model
        ending = () if spec.sampling.ignore_eos else model.eos_token_ids
        self._stop_token_ids = frozenset(ending) | frozenset(spec.sampling.stop_token_ids)

    @property
    def has_first_token(self) -> bool:
        return self.request.num_output_tokens > 0

    @property
    def next_due(self) -> float:
        """When a timer of this unfinished generation runs out next."""
        return min(self.deadline_at, self.abandoned_at, self.progress_at)

    @property
    def phase(self) -> Phase:
        request = self.request
        is_computed = request.num_computed >= len(request.tokens) - 1
        if not request.is_prompt_complete and is_computed:
            return Phase.UPLOADING
        if request.state is RequestState.WAITING:
            return Phase.QUEUED
        if self.has_first_token and is_computed:
            return Phase.DECODING
        return Phase.PREFILLING

    def put_off_progress(self, now: float) -> None:
        """Something was sent: the next progress event is due one interval later."""
        self.progress_at = now + self.request.spec.progress_interval_s

    def deliver(self, sampled: SampledToken) -> tuple[FinishReason | None, str]:
        """Add one output token and its event. Returns why it is the last one, if it is, and the
        stop sequence."""
        request = self.request
        sampling = request.spec.sampling
        request.append_output(sampled.token_id)
        num_output_tokens = request.num_output_tokens
        reason: FinishReason | None = None
        text = stop_sequence = ""
        if (
            sampled.token_id in self._stop_token_ids
            and num_output_tokens > sampling.min_output_tokens
        ):
            reason = FinishReason.STOP
        else:
            text, stop_sequence = self.text.push(sampled.token_id)
        if reason is None and num_output_tokens >= request.spec.max_output_tokens:
            reason = FinishReason.LENGTH
        if reason and not stop_sequence:
            rest, stop_sequence = self.text.finish()
            text += rest
        if stop_sequence:
            reason = FinishReason.STOP
        self.log.append(
            Output(
                index=num_output_tokens - 1,
                text=text,
                token_ids=(sampled.token_id,),
                logprobs=_logprobs(sampled),
            )
        )
        return reason, stop_sequence

    def deliver_scores(self, scored: Sequence[ScoredTokens]) -> None:
        """Add the event of consecutive prompt tokens' log probabilities."""
        self.log.append(
            PromptScores(
                first=scored[0].first,
                logprobs=tuple(chain.from_iterable(part.logprobs for part in scored)),
                top_token_ids=tuple(chain.from_iterable(part.top_token_ids for part in scored)),
                top_logprobs=tuple(chain.from_iterable(part.top_logprobs for part in scored)),
            )
        )

    def flush_text(self) -> None:
        """Add text that is still held back, when the generation ends without another token."""
        text = self.text.finish().text
        if text:
            self.log.append(Output(index=self.request.num_output_tokens, text=text, token_ids=()))

    def usage(self) -> Usage:
        request = self.request
        return Usage(
            input_tokens=request.num_prompt_tokens,
            cached_input_tokens=min(request.num_cached, request.num_prompt_tokens),
            output_tokens=request.num_output_tokens,
            kv_bytes=request.peak_kv_bytes,
            kv_bytes_uncompressed=request.peak_tokens * self._model.kv_bytes_per_token,
            attention_error=request.attention_error,
        )

    def record(self) -> GenerationRecord:
        finished = self.log.finished
        if finished is not None:
            state = _STATES[finished.reason]
        elif self.request.num_planned or self.has_first_token:
            state = GenerationState.RUNNING
        else:
            state = GenerationState.QUEUED
        return GenerationRecord(
            generation=self.id,
            tenant=self.tenant,
            state=state,
            last_sequence=self.log.last_sequence,
            usage=self.usage(),
            create_time_s=self.create_time_s,
            expire_time_s=self.expire_time_s,
        )

    def raise_if_ended(self) -> None:
        """Raises: the error that ended the generation; GenerationNotFound after another end."""
        finished = self.log.finished
        if finished is None:
            return
        if self.error is not None:
            raise self.error
        if finished.reason is FinishReason.DEADLINE:
            raise DeadlineExceeded(f"generation {self.id} passed its deadline: allow more time")
        raise GenerationNotFound(
            f"generation {self.id} has ended ({finished.reason}): it takes no more prompt"
        )


def _logprobs(sampled: SampledToken) -> tuple[TokenLogprob, ...]:
    if sampled.logprob is None:
        return ()
    return (
        TokenLogprob(
            token_id=sampled.token_id,
            logprob=sampled.logprob,
            top=tuple((entry.token_id, entry.logprob) for entry in sampled.top),
        ),
    )
