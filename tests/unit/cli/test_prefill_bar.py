import io

from rich.console import Console

from kvcluster.cli.prefill_bar import PrefillBar
from kvcluster.engine.api import Output, Phase, Progress


def console(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def progress(done: int, total: int, phase: Phase = Phase.PREFILLING) -> Progress:
    return Progress(
        phase=phase,
        done_tokens=done,
        total_tokens=total,
        cached_tokens=0,
        estimated_remaining_s=4.0,
    )


def test_the_bar_says_phase_tokens_and_time_left() -> None:
    screen = console(is_terminal=True)

    with PrefillBar(screen, is_transient=False) as bar:
        bar.show(progress(2048, 6144))

    for shown in ("prefilling", "33%", "2,048 of 6,144 tokens", "first token in 4 s"):
        assert shown in written(screen)


def test_an_unknown_total_is_shown_as_a_count() -> None:
    screen = console(is_terminal=True)

    with PrefillBar(screen, is_transient=False) as bar:
        bar.show(progress(2048, 0, Phase.UPLOADING))

    assert "uploading" in written(screen)
    assert "2,048 tokens" in written(screen)


def test_the_first_output_ends_the_bar() -> None:
    screen = console(is_terminal=True)
    with PrefillBar(screen, is_transient=False) as bar:
        bar.show(progress(1, 2))
        bar.show(Output(index=0, text="a", token_ids=(1,)))
        before = written(screen)

        bar.show(progress(7, 7, Phase.DECODING))

        assert written(screen) == before


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    screen = console(is_terminal=False)

    with PrefillBar(screen, is_transient=True) as bar:
        bar.show(progress(1, 2))

    assert written(screen) == ""


def test_a_bar_that_stays_is_printed_once_without_a_terminal() -> None:
    screen = console(is_terminal=False)

    with PrefillBar(screen, is_transient=False) as bar:
        bar.show(progress(1, 2))
        bar.show(progress(2, 2))

    assert written(screen).count("prefilling") == 1


def test_the_first_output_fills_the_bar() -> None:
    screen = console(is_terminal=False)

    with PrefillBar(screen, is_transient=False) as bar:
        bar.show(progress(6144, 6301))
        bar.show(Output(index=0, text="a", token_ids=(1,)))

    assert "100% 6,301 of 6,301 tokens" in written(screen)
