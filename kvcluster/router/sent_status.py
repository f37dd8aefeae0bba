"""The status that a server sent, kept for the client of an upload."""

from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
from grpc import aio

ValueT = TypeVar("ValueT")


class SentStatus:
    """Takes down a call's status as it arrives.

    grpc.aio overwrites it with INTERNAL when a write fails because the call has just ended
    (grpc/grpc issue 36066): a refused upload would lose its reason in one call of three.
    """

    def __init__(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        self._first: aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    def correct(self, error: aio.AioRpcError) -> aio.AioRpcError | None:
        """The error that the server meant where `error` came out; None: it meant none."""
        if self._first is None:
            return error
        return None if self._first.code() is grpc.StatusCode.OK else self._first

    def _note(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        if self._first is None:
            self._first = aio.AioRpcError(
                _value_of(call.code()),
                aio.Metadata(),
                aio.Metadata.from_tuple(tuple(_value_of(call.trailing_metadata()) or ())),
                _value_of(call.details()),
            )


def _value_of(coroutine: Coroutine[Any, Any, ValueT]) -> ValueT:
    """What a coroutine returns that need not wait: a moment later the status may be another."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: ValueT = stop.value
        return value
    coroutine.close()
    raise AssertionError("the status of an ended call is there at once")
