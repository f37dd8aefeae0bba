"""Tokens of the last minute: what a tenant has used of so many a minute.

A bucket that leaks: what is used drains evenly within a minute. What is reserved does not drain
until it is used or given back. So no minute gets more than twice the limit, and a long run never
more than the limit a minute.
"""

import math

SECONDS = 60.0


class TokenBudget:
    """Mutable. `limit` is given with each call, because an operator may change it any time; `now`
    is of one monotonic clock."""

    def __init__(self) -> None:
        self._used = 0.0
        self._reserved = 0
        self._at = -math.inf

    def used(self, limit: int, now: float) -> int:
        """Tokens that count against the limit now, reserved ones included."""
        return math.ceil(self._drained(limit, now)) + self._reserved

    def wait_s(self, tokens: int, limit: int, now: float) -> float | None:
        """Seconds until so many more fit; 0: they do. None: only once reserved ones are given back,
        or never."""
        room = limit - self._reserved - tokens
        if room < 0:
            return None
        over = self._drained(limit, now) - room
        return max(0.0, over * SECONDS / limit) if over > 0 else 0.0

    def use(self, tokens: int, limit: int, now: float) -> None:
        self._used = self._drained(limit, now) + tokens
        self._at = now

    def reserve(self, tokens: int) -> None:
        self._reserved += tokens

    def give_back(self, tokens: int) -> None:
        """Of what is reserved."""
        self._reserved -= tokens

    def _drained(self, limit: int, now: float) -> float:
        if not self._used or now <= self._at:
            return self._used
        return max(0.0, self._used - (now - self._at) * limit / SECONDS)
