"""What a part of a step costs, as work, and how long the work takes on this machine.

Attention grows with context, so work is not the number of tokens: a part of n tokens after a
history of p is n times the model's dense operations plus the operations of attention over p keys
and its own. How long each kind of operation takes on this machine is learnt from the steps, so that
what tenants share (`fair_share`) and what a step may take are seconds.
"""

import math
from typing import NamedTuple

from kvcluster.types import ModelSpec

_DECODE_FACTOR = 64
"""A decode reads its whole history for one row, bound by memory: each operation counts as many."""
_DECAY = 0.97
"""Weight of the past at each new step: the memory is about thirty steps long."""
_UNKNOWN_PACE = 1e-12
"""Seconds an operation while nothing is known. Small: so little is not held against anyone."""
_SWEEPS = 8
_MIN_STEPS = 4
"""Before this many there is no pace: the first steps pay for warm-up."""


class Work(NamedTuple):
    """Floating-point operations by kind: kinds run at different speeds."""

    dense: float = 0.0
    attention: float = 0.0
    """Of prefill."""
    reading: float = 0.0
    """Of decode's attention, each counted as `_DECODE_FACTOR`."""

    @property
    def total(self) -> float:
        return self.dense + self.attention + self.reading

    def plus(self, other: "Work") -> "Work":
        return Work(*(mine + more for mine, more in zip(self, other, strict=True)))


NO_WORK = Work()
_KINDS = 1 + len(NO_WORK)


class CostModel:
    """Counts the work of one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self._dense = float(spec.dense_flops_per_token or _estimated_dense_flops(spec))
        self._per_key: dict[int | None, float] = {}
        for layer in spec.layers:
            per_key = 2.0 * layer.num_query_heads * (layer.key_dim + layer.value_dim)
            self._per_key[layer.window] = self._per_key.get(layer.window, 0.0) + per_key

    def prefill(self, history: int, num_tokens: int) -> Work:
        """Of positions that attend to `history` tokens before them, and to each other."""
        attention = sum(
            per_key * _visible(history, history + num_tokens, window)
            for window, per_key in self._per_key.items()
        )
        return Work(dense=num_tokens * self._dense, attention=attention)

    def decode(self, history: int) -> Work:
        """Of one token after `history`."""
        work = self.prefill(history, 1)
        return Work(dense=work.dense, reading=_DECODE_FACTOR * work.attention)


class Pace:
    """Seconds a step, learnt from the steps that have run: a decayed least-squares fit of
    fixed + Σ rate x work over the kinds, no rate below zero.

    What is fixed is at most half of the shortest step: where all are cut to take as long, it would
    explain them all, and work would seem to be free.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._products = [[0.0] * _KINDS for _ in range(_KINDS)]
        self._targets = [0.0] * _KINDS
        self._rates = [0.0] * _KINDS
        self._shortest_s = math.inf

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a step that took so long. One without work teaches nothing."""
        if seconds <= 0 or work.total <= 0:
            return
        self._num_steps += 1
        self._shortest_s = min(seconds, self._shortest_s / _DECAY)
        terms = (1.0, *work)
        for i, one in enumerate(terms):
            self._targets[i] = _DECAY * self._targets[i] + one * seconds
            for j, other in enumerate(terms):
                self._products[i][j] = _DECAY * self._products[i][j] + one * other
        # From where it was: a few sweeps of coordinate descent follow a slow drift.
        for _ in range(_SWEEPS):
            for i in range(_KINDS):
                self._improve(i)

    @property
    def is_known(self) -> bool:
        return self._num_steps >= _MIN_STEPS

    @property
    def fixed_s(self) -> float:
        """What a step takes however little it computes."""
        return self._rates[0]

    def seconds(self, work: Work) -> float:
        """What the work adds to a step."""
        if not self.is_known:
            return work.total * _UNKNOWN_PACE
        return sum(rate * count for rate, count in zip(self._rates[1:], work, strict=True))

    def step_s(self, work: Work) -> float:
        """What a step of this work takes; 0 while nothing is known, and where there is no work."""
        if not self.is_known or work.total <= 0:
            return 0.0
        return self.fixed_s + self.seconds(work)

    def _improve(self, i: int) -> None:
        own = self._products[i][i]
        if own > 0:
            row = zip(self._products[i], self._rates, strict=True)
            others = sum(product * rate for product, rate in row) - own * self._rates[i]
            most = self._shortest_s / 2 if i == 0 else math.inf
            self._rates[i] = min(most, max(0.0, (self._targets[i] - others) / own))


def _visible(start: int, end: int, window: int | None) -> float:
    """Sum over positions [start, end) of the keys that each sees, itself included."""
    if window is None or end <= window:
        return (end * (end + 1) - start * (start + 1)) / 2
    if start >= window:
        return float((end - start) * window)
    return _visible(start, window, None) + (end - window) * window


def _estimated_dense_flops(spec: ModelSpec) -> int:
    """Of a transformer whose hidden size is that of its queries: 12 hidden² weights a layer."""
    return sum(24 * (layer.num_query_heads * layer.key_dim) ** 2 for layer in spec.layers)
