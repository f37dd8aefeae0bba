"""The bar that shows how far a prompt's prefill is, on stderr."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from kvcluster.engine import api


class PrefillBar:
    """Shown from the first progress event to the first output. Where stderr is no terminal nothing
    is drawn; a bar that stays (`is_transient` false) is then printed once, when it ends.
    """

    def __init__(self, console: Console, *, is_transient: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=40),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=is_transient,
        )
        self._task = self._progress.add_task("queued", total=None, detail="")
        self._total_tokens = 0
        self._is_running = False
        self._has_output = False
        # rich ends even an unseen bar with an empty line.
        self._is_shown = console.is_terminal or not is_transient

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def show(self, event: api.Event) -> None:
        match event:
            case api.Progress() if not self._has_output:
                self._start()
                self._total_tokens = event.total_tokens
                self._progress.update(
                    self._task,
                    description=str(event.phase),
                    completed=event.done_tokens,
                    total=event.total_tokens or None,
                    detail=_detail(event),
                )
            case api.Output():
                self._has_output = True
                self._fill()
                self.stop()
            case api.Finished():
                self.stop()

    def stop(self) -> None:
        """Ends the bar; a second call changes nothing."""
        if self._is_running:
            self._progress.stop()
            self._is_running = False

    def _start(self) -> None:
        if self._is_shown and not self._is_running:
            self._progress.start()
            self._is_running = True

    def _fill(self) -> None:
        # The last chunk's progress and the first output are one event.
        if self._total_tokens:
            self._progress.update(
                self._task,
                completed=self._total_tokens,
                detail=f"{self._total_tokens:,} of {self._total_tokens:,} tokens",
            )


def _detail(event: api.Progress) -> str:
    of_total = f" of {event.total_tokens:,}" if event.total_tokens else ""
    remaining_s = event.estimated_remaining_s
    eta = "" if remaining_s is None else f", first token in {remaining_s:.0f} s"
    return f"{event.done_tokens:,}{of_total} tokens{eta}"
