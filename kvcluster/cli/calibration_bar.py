"""The bars that show how far a calibration is, and about how long the rest takes, on stderr."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_PASSES: Final = ("texts", "recipes")
"""Stages that are counted in passes over texts of one length, which take about as long each."""
_FEWEST: Final = 2
"""Passes that tell how long one takes: the first also warms up."""
_MINUTE_S: Final = 60


@dataclass(slots=True)
class _Stage:
    task: TaskID
    done: int = 0
    total: int | None = None


class CalibrationBar:
    """One bar a stage. What is left of all of them is told from the passes that this run made:
    those that an earlier one had finished are no measure."""

    def __init__(
        self,
        console: Console,
        stages: tuple[str, ...],
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=40),
            TextColumn("{task.fields[detail]:<12}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._stages = {
            name: _Stage(self._progress.add_task(name, total=None, start=False, detail="", left=""))
            for name in stages
        }
        self._now = now
        self._started_at: float | None = None
        self._num_made = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, name: str, done: int, total: int) -> None:
        """`done` of `total` of a stage are done. A stage may be announced before it begins."""
        stage = self._stages[name]
        is_announced = stage.total is None
        if done or not is_announced:
            self._progress.start_task(stage.task)
        if self._started_at is None:
            self._started_at = self._now()
        if name in _PASSES and done == stage.done + 1:
            self._num_made += 1
        stage.done, stage.total = done, total
        self._progress.update(
            stage.task, completed=done, total=total, detail=f"{done:,} of {total:,}"
        )
        if name in _PASSES:
            for other in self._stages.values():
                self._progress.update(other.task, left="" if other is not stage else self._left())

    def _left(self) -> str:
        """Empty where it is not known, and at the end."""
        counted = [stage for name, stage in self._stages.items() if name in _PASSES]
        left = sum((stage.total or 0) - stage.done for stage in counted)
        if self._started_at is None or self._num_made < _FEWEST or not left:
            return ""
        left_s = (self._now() - self._started_at) / self._num_made * left
        return f"about {math.ceil(left_s / _MINUTE_S):,} min left in all"
