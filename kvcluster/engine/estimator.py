"""How long prefill and decode will take, learnt from the steps that have run."""

from dataclasses import dataclass

from kvcluster.engine.plan import StepPlan

DECAY = 0.95
"""Weight of the past at each new step: the memory is about twenty steps long."""

MIN_STEPS = 4
"""Before this many prefill steps there is no estimate: the first ones pay for warm-up."""


@dataclass(frozen=True, slots=True)
class EstimatorStatistics:
    """A snapshot of what has been learnt."""

    num_prefill_steps: int
    seconds_per_token: float
    seconds_per_token_of_context: float
    decode_step_s: float | None


class SpeedEstimator:
    """Decayed least-squares fit of seconds = a * tokens + b * tokens * context.

    The second term is attention, the first all the rest. Steps without prefill only feed the
    decode average.
    """

    def __init__(self) -> None:
        self._num_prefill_steps = 0
        self._tokens_2 = 0.0
        self._tokens_work = 0.0
        self._work_2 = 0.0
        self._tokens_s = 0.0
        self._work_s = 0.0
        self._decode_step_s: float | None = None

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a completed step."""
        if not plan.sequences or seconds <= 0:
            return
        if all(not part.token_ids for part in plan.sequences):
            last = self._decode_step_s
            self._decode_step_s = seconds if last is None else 0.8 * last + 0.2 * seconds
            return
        tokens = float(sum(part.num_tokens for part in plan.sequences))
        work = sum(_work(part.start, part.start + part.num_tokens) for part in plan.sequences)
        self._num_prefill_steps += 1
        self._tokens_2 = DECAY * self._tokens_2 + tokens * tokens
        self._tokens_work = DECAY * self._tokens_work + tokens * work
        self._work_2 = DECAY * self._work_2 + work * work
        self._tokens_s = DECAY * self._tokens_s + tokens * seconds
        self._work_s = DECAY * self._work_s + work * seconds

    def prefill_s(self, start: int, end: int) -> float | None:
        """Seconds to prefill positions [start, end) with nothing else running."""
        if self._num_prefill_steps < MIN_STEPS:
            return None
        per_token, per_work = self._fit()
        return per_token * (end - start) + per_work * _work(start, end)

    def decode_s(self, num_tokens: int) -> float | None:
        """Seconds to generate `num_tokens`, at the speed of recent steps."""
        return None if self._decode_step_s is None else self._decode_step_s * num_tokens

    def statistics(self) -> EstimatorStatistics:
        per_token, per_work = self._fit() if self._num_prefill_steps else (0.0, 0.0)
        return EstimatorStatistics(
            num_prefill_steps=self._num_prefill_steps,
            seconds_per_token=per_token,
            seconds_per_token_of_context=per_work,
            decode_step_s=self._decode_step_s,
        )

    def _fit(self) -> tuple[float, float]:
        """Neither speed may be negative: extrapolation to long prompts would go below zero."""
        only_tokens = (self._tokens_s / self._tokens_2, 0.0)
        determinant = self._tokens_2 * self._work_2 - self._tokens_work**2
        # Steps that are all alike cannot tell the two terms apart.
        if determinant <= 1e-9 * self._tokens_2 * self._work_2:
            return only_tokens
        per_token = self._tokens_s * self._work_2 - self._work_s * self._tokens_work
        per_work = self._work_s * self._tokens_2 - self._tokens_s * self._tokens_work
        if per_work < 0:
            return only_tokens
        if per_token < 0:
            return (0.0, self._work_s / self._work_2)
        return (per_token / determinant, per_work / determinant)


def _work(start: int, end: int) -> float:
    """Sum of the context lengths of positions [start, end)."""
    return (end * end - start * start) / 2
