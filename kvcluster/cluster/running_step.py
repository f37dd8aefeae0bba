"""A step that has begun: its outcome may still be on its way from the device."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from kvcluster.engine.plan import RankAnswer, SampledToken, StepResult


class StepBefore(msgspec.Struct, frozen=True, array_like=True):
    """What all ranks found in one step, as each of them has to know before the next."""

    sampled: tuple[SampledToken, ...] = ()
    failed: tuple[int, ...] = ()
    """Sequences that no rank computes any more."""

    @classmethod
    def of(cls, result: StepResult) -> "StepBefore":
        """What is to be known of a step that has this result."""
        return cls(result.sampled, tuple(failure.sequence for failure in result.failed))


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave on one rank."""

    answer: RankAnswer
    answering_ranks: tuple[int, ...]
    """The ranks that have something to say, ascending: the same on every rank."""


@dataclass
class RunningStep:
    """`outcome` may be called in any thread, as often as one likes."""

    find: Callable[[], StepOutcome]
    """Waits for the outcome. Called once."""
    rows: Mapping[int, int] = field(default_factory=dict)
    """By sequence: the row of the device's own tokens that this step will leave there. Empty where
    the outcome is there already."""
    _found: StepOutcome | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def outcome(self) -> StepOutcome:
        """What the step gave. Raises what `find` raises."""
        with self._lock:
            if self._found is None:
                self._found = self.find()
            return self._found
