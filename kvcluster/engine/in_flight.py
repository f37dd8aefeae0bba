"""The steps that are planned but not done, and the check that results answer them exactly."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from kvcluster.engine.draft import PlannedStep
from kvcluster.engine.plan import (
    SampledToken,
    ScoredTokens,
    Scoring,
    SequenceFailure,
    SequenceStep,
    StepResult,
)
from kvcluster.engine.request import Request
from kvcluster.errors import RankLost
from kvcluster.types import SequenceId


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
    """One for each of the plan's sequences; None where the step gave none."""
    scored: tuple[tuple[ScoredTokens, ...], ...]
    """One for each of the plan's sequences: in order of position, without gaps."""
    failed: Mapping[int, SequenceFailure]
    """Those that failed in this step. Nothing else came of them."""
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
        self._void: set[int] = set()
        """Sequences whose results say nothing, if there are any: they have failed, or read what one
        that failed has left."""

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
        """Take out the oldest step. Sequences that fail in it are void from now on.

        Raises: RankLost when `result` is not exactly its answer, void sequences left aside.
        """
        if not self._steps:
            raise RankLost(f"the ranks answered step {result.step}, but no step is in flight")
        planned, planned_at = self._steps[0]
        plan = planned.plan
        if (result.epoch, result.step) != (plan.epoch, plan.step):
            raise RankLost(
                f"the ranks answered step {result.step} of epoch {result.epoch}, expected step "
                f"{plan.step} of epoch {plan.epoch}"
            )
        failed = self._note_failed(planned, result)
        sampled, scored = self._match(planned, result), self._match_scored(planned, result)
        self._steps.popleft()
        if self._void:
            plans = (ahead.plan for ahead, _ in self._steps)
            self._void &= {part.sequence for plan in plans for part in plan.sequences}
        seconds = now - max(planned_at, self._settled_at)
        self._settled_at = now
        return SettledStep(planned, sampled, scored, failed, seconds)

    def void(self, sequence: SequenceId) -> None:
        """Whatever comes of the sequence from steps in flight is thrown away."""
        self._void.add(sequence)

    def reset(self) -> None:
        """Forget all steps; the next one is number 1 again."""
        self._steps.clear()
        self._void.clear()
        self.num_planned = 0

    def _note_failed(self, planned: PlannedStep, result: StepResult) -> dict[int, SequenceFailure]:
        """By sequence, what failed first of those that had not failed before."""
        known = {part.sequence for part in planned.plan.sequences}
        found: dict[int, SequenceFailure] = {}
        for failure in result.failed:
            if failure.sequence not in known:
                raise RankLost(
                    f"step {result.step} failed for sequence {failure.sequence}, which is not in it"
                )
            if failure.sequence not in self._void:
                found.setdefault(failure.sequence, failure)
        self._void.update(found)
        return found

    def _match(self, planned: PlannedStep, result: StepResult) -> tuple[SampledToken | None, ...]:
        expected = [
            (part.sequence, part.start + part.num_tokens)
            for part in planned.plan.sequences
            if part.samples and part.sequence not in self._void
        ]
        sampled = [token for token in result.sampled if token.sequence not in self._void]
        answered = [(token.sequence, token.position) for token in sampled]
        if expected != answered:
            raise RankLost(
                f"step {result.step} sampled (sequence, position) {answered}, expected {expected}"
            )
        for token in sampled:
            if not 0 <= token.token_id < self._vocab_size:
                raise RankLost(f"step {result.step} sampled token id {token.token_id}")
        by_sequence = {token.sequence: token for token in sampled}
        return tuple(by_sequence.get(part.sequence) for part in planned.plan.sequences)

    def _match_scored(
        self, planned: PlannedStep, result: StepResult
    ) -> tuple[tuple[ScoredTokens, ...], ...]:
        """The scored tokens of each of the plan's sequences. Raises: RankLost as `settle` does."""
        found = (tokens for tokens in result.scored if tokens.sequence not in self._void)
        answered = {
            sequence: tuple(scored)
            for sequence, scored in groupby(found, key=lambda tokens: tokens.sequence)
        }
        parts = (part for part in planned.plan.sequences if part.sequence not in self._void)
        _check_scored(result.step, {p.sequence: p.scoring for p in parts if p.scoring}, answered)
        return tuple(answered.get(part.sequence, ()) for part in planned.plan.sequences)


def _check_scored(
    step: int,
    asked: Mapping[int, Scoring],
    answered: Mapping[int, Sequence[ScoredTokens]],
) -> None:
    if list(asked) != list(answered):
        raise RankLost(f"step {step} scored sequences {list(answered)}, expected {list(asked)}")
    for sequence, scoring in asked.items():
        position = scoring.first
        for tokens in answered[sequence]:
            if tokens.first != position:
                break
            position += len(tokens.logprobs)
        if position != scoring.below:
            raise RankLost(
                f"step {step} scored sequence {sequence} up to {position}, expected all of "
                f"{scoring.first} to {scoring.below}"
            )
