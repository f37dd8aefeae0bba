"""Lets calls that come in threads of their own begin in the order of their numbers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvcluster.errors import RankLost


class Turns:
    """Numbers are taken one after another, from `first` on."""

    def __init__(self, first: int = 1) -> None:
        self._next = first
        self._is_broken = False
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """The block runs once all earlier numbers' blocks have ended, one at a time. An error in
        one ends all that come after it.

        Raises: RankLost for a number whose turn is over, or does not come any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_broken or self._next >= number)
            if self._is_broken or self._next > number:
                raise RankLost(f"call {number} cannot begin: call {self._next} is due")
        # Not under the lock: whoever ends the turns must not wait for a block that hangs.
        try:
            yield
        except BaseException:
            self.end()
            raise
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Nobody's turn comes any more."""
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()
