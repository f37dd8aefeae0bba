"""How a command ends: one line that says what is wrong and what to do, and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TextIO

import msgspec
import typer

from kvcluster.errors import (
    AccessError,
    AdmissionError,
    ClientTooSlow,
    ComputationFailed,
    ConfigError,
    DeadlineExceeded,
    KvClusterError,
    ModelError,
    RankLost,
    RequestError,
    ServerUnavailable,
    SpillError,
    StoreUnavailable,
)

EXIT_CODES = """\
Exit codes: 0 done; 1 a bug in kvcluster; 2 wrong usage, setting, key or request; 3 server not
reachable or not ready; 4 refused for now: overloaded, draining or over quota; 5 deadline passed, or
generation cancelled or failed; 130 interrupted.
"""


class ExitCode(IntEnum):
    OK = 0
    BUG = 1
    USAGE = 2
    UNAVAILABLE = 3
    REFUSED = 4
    ENDED_EARLY = 5
    INTERRUPTED = 130


class _ErrorReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints when a command fails."""

    kind: str
    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None


def exit_code(error: KvClusterError) -> ExitCode:
    match error:
        case RequestError() | ConfigError() | ModelError() | AccessError():
            return ExitCode.USAGE
        case AdmissionError():
            return ExitCode.REFUSED
        case DeadlineExceeded() | ComputationFailed():
            return ExitCode.ENDED_EARLY
        case RankLost() | ServerUnavailable() | ClientTooSlow() | StoreUnavailable() | SpillError():
            return ExitCode.UNAVAILABLE
    return ExitCode.BUG


@contextmanager
def exiting(*, as_json: bool) -> Iterator[None]:
    """Turn our errors and Ctrl-C into a line on stderr (with `as_json`, also an object on stdout)
    and the exit code. Any other exception is a bug and passes, with its traceback.
    """
    try:
        yield
    except KvClusterError as error:
        report(error, as_json=as_json)
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt as interrupt:
        typer.echo("kvcluster: interrupted", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from interrupt


def report(error: KvClusterError, *, as_json: bool) -> None:
    typer.echo(f"kvcluster: {error.message}{_advice(error)}", err=True)
    if as_json:
        record = _ErrorReport(
            kind=type(error).__name__,
            reason=error.reason,
            message=error.message,
            metadata=error.metadata,
            retry_after_s=error.retry_after_s,
        )
        print_json({"error": record})


def print_json(value: object, stream: TextIO | None = None) -> None:
    """Write one object, on one line, to `stream` (default: stdout)."""
    target = stream or sys.stdout
    target.write(msgspec.json.encode(value).decode() + "\n")
    target.flush()


def _advice(error: KvClusterError) -> str:
    if error.retry_after_s is None:
        return ""
    return f" (try again in {error.retry_after_s:.0f} s)"
