"""One attack: what it tries, what would be a breach, and what came of it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from kvcluster.audit.scene import Scene


class Verdict(StrEnum):
    HELD = "held"
    """The server withstood."""
    BREACH = "breach"
    """It did not."""
    INCONCLUSIVE = "inconclusive"
    """The attack's control was not seen, so that nothing follows from what was seen."""
    SKIPPED = "skipped"
    """The server does not have what is attacked."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an attack."""

    verdict: Verdict
    found: str
    """One sentence. Never a secret."""
    measured: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class Attack:
    """Runs against the tenants of a scene."""

    name: str
    tries: str
    breach: str
    run: "Callable[[Scene], Awaitable[Outcome]]"


def attack(
    *, tries: str, breach: str
) -> "Callable[[Callable[[Scene], Awaitable[Outcome]]], Attack]":
    """Makes an Attack of a function, by whose name it is called."""

    def made(run: "Callable[[Scene], Awaitable[Outcome]]") -> Attack:
        return Attack(run.__name__.replace("_", "-"), tries, breach, run)

    return made


def held(found: str, **measured: float) -> Outcome:
    return Outcome(verdict=Verdict.HELD, found=found, measured=measured)


def breached(found: str, **measured: float) -> Outcome:
    return Outcome(verdict=Verdict.BREACH, found=found, measured=measured)


def inconclusive(found: str, **measured: float) -> Outcome:
    return Outcome(verdict=Verdict.INCONCLUSIVE, found=found, measured=measured)


def skipped(found: str) -> Outcome:
    return Outcome(verdict=Verdict.SKIPPED, found=found)
