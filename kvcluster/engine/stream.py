"""What leaves the engine: the event log of a generation, and the text of its tokens."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from kvcluster.engine.api import Event, Finished, GenerationEvent
from kvcluster.engine.text import OutputDecoder
from kvcluster.errors import ResumeExpired
from kvcluster.types import GenerationId


class Signal:
    """Wakes everyone who waits, each time something changes. Costs nothing while nobody does."""

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None

    def notify(self) -> None:
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Return at the next `notify`."""
        if self._event is None:
            self._event = asyncio.Event()
        await self._event.wait()


class EventLog:
    """All events of one generation, numbered 1, 2, 3 … without gaps. Nothing follows `Finished`."""

    def __init__(self, generation: GenerationId) -> None:
        self.generation = generation
        self._events: list[GenerationEvent] = []
        self._grown = Signal()

    @property
    def last_sequence(self) -> int:
        return len(self._events)

    @property
    def is_finished(self) -> bool:
        return bool(self._events) and isinstance(self._events[-1].event, Finished)

    @property
    def finished(self) -> Finished | None:
        event = self._events[-1].event if self._events else None
        return event if isinstance(event, Finished) else None

    def append(self, event: Event) -> None:
        """Add an event and wake the readers."""
        if self.is_finished:
            raise ValueError(f"generation {self.generation} has finished: no event may follow")
        sequence = len(self._events) + 1
        self._events.append(
            GenerationEvent(generation=self.generation, sequence=sequence, event=event)
        )
        self._grown.notify()

    def after(self, sequence: int) -> tuple[GenerationEvent, ...]:
        """The events that exist after `sequence`. Raises ResumeExpired beyond the last one."""
        if not 0 <= sequence <= self.last_sequence:
            raise ResumeExpired(
                f"generation {self.generation} has events 1 to {self.last_sequence}, none after "
                f"{sequence}: resume from an event that was received"
            )
        return tuple(self._events[sequence:])

    async def follow(
        self, after_sequence: int
    ) -> AsyncGenerator[tuple[GenerationEvent, ...], None]:
        """Replay, then follow until `Finished`. Each item is what has come since the last one."""
        sequence = after_sequence
        while True:
            events = self.after(sequence)
            if events:
                sequence += len(events)
                yield events
            elif self.is_finished:
                return
            else:
                await self._grown.wait()


class TextPiece(NamedTuple):
    """Text that may be shown now. `stop_sequence` is set when it ends here."""

    text: str
    stop_sequence: str = ""


class OutputText:
    """Decodes output tokens, and holds text back while it could begin a stop string.

    The stop string that is complete first ends the text, which is cut before it. The result does
    not depend on how the text is divided into tokens.
    """

    def __init__(self, decoder: OutputDecoder | None, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._longest = max((len(word) for word in self._stop), default=0)
        self._held = ""

    def push(self, token_id: int) -> TextPiece:
        """Take one more token. After a stop sequence nothing more may be pushed."""
        return self._advance(self._decoder.push(token_id)) if self._decoder else TextPiece("")

    def finish(self) -> TextPiece:
        """The rest of the text, when no more tokens come."""
        if self._decoder is None:
            return TextPiece("")
        piece = self._advance(self._decoder.finish())
        self._decoder = None
        if piece.stop_sequence:
            return piece
        rest, self._held = self._held, ""
        return TextPiece(piece.text + rest)

    def _advance(self, text: str) -> TextPiece:
        held = self._held + text
        if not text or not self._stop:
            self._held = held if self._stop else ""
            return TextPiece("" if self._stop else held)
        matches = [
            (start + len(word), start, word)
            for word in self._stop
            if (start := held.find(word)) >= 0
        ]
        if matches:
            _, start, word = min(matches)
            self._held = ""
            self._decoder = None
            return TextPiece(held[:start], word)
        sure = len(held) - self._num_undecided(held)
        self._held = held[sure:]
        return TextPiece(held[:sure])

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(word.startswith(end) for word in self._stop):
                return length
        return 0
