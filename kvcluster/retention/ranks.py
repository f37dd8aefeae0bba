"""The ranks that hold one sequence's tokens, as far as choosing survivors concerns them."""

from typing import Final, Protocol

from torch import Tensor


class Ranks(Protocol):
    """Collectives. Every rank makes the same calls in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum of the integers that every rank gives, in equal shapes: the same on all ranks."""
        ...

    def gather(self, x: Tensor) -> list[Tensor]:
        """What every rank gives, in order of rank. Shapes may differ in the last axis."""
        ...


class _Alone:
    """One rank that holds all tokens."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        return [x]


ALONE: Final[Ranks] = _Alone()
