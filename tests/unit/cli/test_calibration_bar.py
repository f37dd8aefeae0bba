"""The bars of a calibration say what is done, of how much, and about how long the rest takes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from kvcluster.cli.calibration_bar import CalibrationBar


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def bar(clock: Clock, *more: str) -> Iterator[tuple[CalibrationBar, io.StringIO]]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False, width=120)
    yield CalibrationBar(console, ("texts", *more, "recipes"), now=clock), screen


def shown(of: CalibrationBar, screen: io.StringIO) -> list[str]:
    """The lines of the bars, without the bars."""
    with of:
        pass
    return [" ".join(line.replace("━", "").split()) for line in screen.getvalue().splitlines()]


def test_stages_are_counted_and_what_is_left_is_told_of_both() -> None:
    clock = Clock()
    with bar(clock) as (calibration, screen):
        calibration.show("recipes", 0, 20)
        calibration.show("texts", 0, 4)
        for done in range(1, 4):
            clock.now_s += 30
            calibration.show("texts", done, 4)

        texts, recipes = shown(calibration, screen)

    # 21 passes of half a minute.
    assert texts == "texts 3 of 4 0:00:00 about 11 min left in all"
    assert recipes == "recipes 0 of 20 -:--:--"


def test_what_is_left_stands_beside_the_stage_that_runs() -> None:
    clock = Clock()
    with bar(clock) as (calibration, screen):
        calibration.show("recipes", 0, 20)
        for done in range(5):
            calibration.show("texts", done, 4)
            clock.now_s += 60
        calibration.show("recipes", 1, 20)

        texts, recipes = shown(calibration, screen)

    assert texts == "texts 4 of 4 0:00:00"
    assert recipes == "recipes 1 of 20 0:00:00 about 19 min left in all"


def test_passes_of_an_earlier_run_are_no_measure() -> None:
    clock = Clock()
    with bar(clock) as (calibration, screen):
        calibration.show("recipes", 0, 20)
        calibration.show("texts", 4, 4)
        for done in (1, 2, 12, 13, 14):
            clock.now_s += 0 if done == 12 else 60
            calibration.show("recipes", done, 20)

        _, recipes = shown(calibration, screen)

    # Four passes of a minute were made, and six are left.
    assert recipes == "recipes 14 of 20 0:00:00 about 6 min left in all"


def test_one_pass_tells_nothing_and_the_end_has_nothing_left() -> None:
    clock = Clock()
    with bar(clock) as (calibration, screen):
        calibration.show("recipes", 0, 1)
        calibration.show("texts", 0, 1)
        clock.now_s += 60
        calibration.show("texts", 1, 1)
        calibration.show("recipes", 0, 1)
        clock.now_s += 60
        calibration.show("recipes", 1, 1)

        lines = shown(calibration, screen)

    assert lines == ["texts 1 of 1 0:00:00", "recipes 1 of 1 0:00:00"]


def test_stages_of_training_are_no_passes() -> None:
    clock = Clock()
    with bar(clock, "refinement") as (calibration, screen):
        calibration.show("recipes", 0, 2)
        for done in range(3):
            calibration.show("texts", done, 2)
            clock.now_s += 60
        calibration.show("refinement", 1, 300)

        _, refinement, _ = shown(calibration, screen)

    assert refinement == "refinement 1 of 300 0:00:00"
