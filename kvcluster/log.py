"""Logs are events with fields: `log.info("rank_lost", rank=3, num_requests=5)`.

No prompt, output, token id, key or secret reaches a log, by construction: numbers pass under any
name but those of tokens, text passes only under the names in `TEXT_FIELDS`, everything else is
replaced by its type. An exception is logged as its class and its frames, without its message, which
may quote a request.
"""

import logging
import re
import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

TEXT_FIELDS = frozenset(
    {"address", "dtype", "error", "generation", "level", "listen", "logger", "method", "model"}
    | {"node", "phase", "placement", "policy", "reason", "route", "signal", "source", "state"}
    | {"status", "tenant", "tier", "timestamp", "transport", "version"}
)
"""The fields whose text is written. None of them is ever filled from a prompt or an output."""

_TOKEN_FIELDS = frozenset({"token", "token_id", "token_ids", "prompt_ids", "ids", "seed"})
_MAX_TEXT = 200
_MAX_FRAMES = 20
_EVENT_NAME = re.compile(r"[a-z][a-z0-9_]*")


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose events are kept clean in any process, whether or not `configure` ran there."""
    logger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            *_CLEANING,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return cast(structlog.stdlib.BoundLogger, logger)


def configure(*, level: str, as_json: bool, stream: TextIO | None = None) -> None:
    """Write this process's events from `level` up to `stream` (default: standard error).

    Called once by each process that kvcluster starts; calling it again replaces what was set.
    """
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    target = logging.StreamHandler(stream or sys.stderr)
    target.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_CLEANING,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger("kvcluster")
    root.handlers = [target]
    root.setLevel(level.upper())
    root.propagate = False


def bound(*, generation: str, tenant: str) -> AbstractContextManager[None]:
    """Every event of this task, and of those it starts, carries the two names."""
    return structlog.contextvars.bound_contextvars(generation=generation, tenant=tenant)


def _keep_only_safe(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {name: _safe(name, value) for name, value in event.items()}


def _safe(name: str, value: object) -> object:
    if name.startswith("_"):  # structlog's own, removed before an event is rendered
        return value
    if name == "event":
        is_name = isinstance(value, str) and _EVENT_NAME.fullmatch(value)
        return value if is_name else "event_without_a_name"
    if name not in _TOKEN_FIELDS and (value is None or isinstance(value, bool | int | float)):
        return value
    if name in TEXT_FIELDS and isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}…"
    if name == "frames" and isinstance(value, _Frames):
        return list(value)
    return f"<{type(value).__name__}>"


class _Frames(tuple[str, ...]):
    """Frames as `_describe_exception` writes them, and nobody else."""


def _describe_exception(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    exc_info = event.pop("exc_info", None)
    error = sys.exc_info()[1] if exc_info is True else exc_info
    if isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        event["error"] = _class_names(error)
        event["frames"] = _frames(error.__traceback__)
    return event


def _class_names(error: BaseException) -> str:
    names = [type(error).__name__]
    while (cause := error.__cause__) is not None:
        names.append(type(cause).__name__)
        error = cause
    return " from ".join(names)


def _frames(traceback: TracebackType | None) -> _Frames:
    found: list[str] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        found.append(f"{code.co_filename}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return _Frames(found[-_MAX_FRAMES:])


_CLEANING: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    _describe_exception,
    _keep_only_safe,
]
