"""The steps that are planned but not done, and the check that results answer them exactly."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from kvcluster.engine.draft import PlannedStep
from kvcluster.engine.plan import SampledToken, ScoredTokens, SequenceStep, StepResult
from kvcluster.engine.request import Request
from kvcluster.errors import RankLost


class SettledPart(NamedTuple):
    """One sequence's part of a step whose result is in."""

    step: SequenceStep
    request: Request
    sampled: SampledToken | None
    scored: tuple[ScoredTokens, ...]


@dataclass(frozen=True, slots=True)
class SettledStep:
    """A step whose result is in."""

    planned: PlannedStep
    sampled: tuple[SampledToken | None, ...]
    """One for each of the plan's sequences; None where the step did not sample."""
    scored: tuple[tuple[ScoredTokens, ...], ...]
    """One for each of the plan's sequences: in order of position, without gaps."""
    seconds: float
    """From the moment when it could run: planned, and the step before it done."""

    def parts(self) -> Iterator[SettledPart]:
        """Each sequence's part."""
        return map(
            SettledPart,
            self.planned.plan.sequences,
            self.planned.requests,
            self.sampled,
            self.scored,
        )


class StepsInFlight:
    """First in, first out. Numbers steps 1, 2, 3 … within an epoch."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._steps: deque[tuple[PlannedStep, float]] = deque()
        self._settled_at = -math.inf
        self.num_planned = 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, planned: PlannedStep, *, now: float) -> None:
        self._steps.append((planned, now))
        self.num_planned += 1

    @property
    def done_at(self) -> float:
        """When all of them are expected to be done, or were; minus infinity while there is none."""
        if not self._steps:
            return -math.inf
        begun_at = max(self._steps[0][1], self._settled_at)
        return begun_at + sum(planned.seconds for planned, _ in self._steps)

    def settle(self, result: StepResult, *, now: float) -> SettledStep:
        """Take out the oldest step. Raises RankLost when `result` is not exactly its answer."""
        if not self._steps:
            raise RankLost(f"the ranks answered step {result.step}, but no step is in flight")
        planned, planned_at = self._steps[0]
        plan = planned.plan
        if (result.epoch, result.step) != (plan.epoch, plan.step):
            raise RankLost(
                f"the ranks answered step {result.step} of epoch {result.epoch}, expected step "
                f"{plan.step} of epoch {plan.epoch}"
            )
        sampled, scored = self._match(planned, result), _match_scored(planned, result)
        self._steps.popleft()
        seconds = now - max(planned_at, self._settled_at)
        self._settled_at = now
        return SettledStep(planned, sampled, scored, seconds)

    def reset(self) -> None:
        """Forget all steps; the next one is number 1 again."""
        self._steps.clear()
        self.num_planned = 0

    def _match(self, planned: PlannedStep, result: StepResult) -> tuple[SampledToken | None, ...]:
        expected = [
            (part.sequence, part.start + part.num_tokens)
            for part in planned.plan.sequences
            if part.samples
        ]
        answered = [(token.sequence, token.position) for token in result.sampled]
        if expected != answered:
            raise RankLost(
                f"step {result.step} sampled (sequence, position) {answered}, expected {expected}"
            )
        for token in result.sampled:
            if not 0 <= token.token_id < self._vocab_size:
                raise RankLost(f"step {result.step} sampled token id {token.token_id}")
        tokens = iter(result.sampled)
        return tuple(next(tokens) if part.samples else None for part in planned.plan.sequences)


def _match_scored(planned: PlannedStep, result: StepResult) -> tuple[tuple[ScoredTokens, ...], ...]:
    """The scored tokens of each of the plan's sequences. Raises: RankLost as `settle` does."""
    answered = {
        sequence: tuple(scored)
        for sequence, scored in groupby(result.scored, key=lambda tokens: tokens.sequence)
    }
    asked = {part.sequence: part.scoring for part in planned.plan.sequences if part.scoring}
    if list(asked) != list(answered):
        raise RankLost(
            f"step {result.step} scored sequences {list(answered)}, expected {list(asked)}"
        )
    for sequence, scoring in asked.items():
        position = scoring.first
        for tokens in answered[sequence]:
            if tokens.first != position:
                break
            position += len(tokens.logprobs)
        if position != scoring.below:
            raise RankLost(
                f"step {result.step} scored sequence {sequence} up to {position}, expected all of "
                f"{scoring.first} to {scoring.below}"
            )
    return tuple(answered.get(part.sequence, ()) for part in planned.plan.sequences)
