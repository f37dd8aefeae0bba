"""What the scheduler asks and gives: the choice of a route, a step as it is being planned, and one
that is planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcluster.engine.lanes import StepBudget
from kvcluster.engine.plan import SequenceStart, SequenceStep, StepPlan
from kvcluster.engine.request import Request
from kvcluster.engine.step_cost import NO_WORK, Work
from kvcluster.engine.turns import Turns
from kvcluster.types import LayerGeometry, Route, TenantId


class RouteChoice(Protocol):
    """The cheapest way for a chunk's queries to meet history on other ranks
    (`attention.strategy.choose_route`)."""

    def __call__(
        self,
        layers: Sequence[LayerGeometry],
        *,
        num_new_tokens: int,
        num_history_tokens: int,
        num_ranks: int,
        element_bytes: float,
        stored_share: float,
    ) -> Route: ...


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan, and whose parts it has."""

    plan: StepPlan
    requests: tuple[Request, ...]
    """One for each of `plan.sequences`."""
    work: Work = NO_WORK
    """Of all of them."""
    charges: Mapping[TenantId, float] = field(default_factory=dict)
    """Seconds that tenants were charged for it beforehand."""
    seconds: float = 0.0
    """That it was expected to take; 0 while nothing is known of that."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a look at the queues gave."""

    step: PlannedStep | None
    """None: nothing to do now."""
    refused: tuple[Request, ...]
    """Requests that cannot get a block even alone. The caller ends them."""


@dataclass(slots=True)
class Draft:
    """Mutable: what the step has so far, and what it has room for."""

    budget: StepBudget
    turns: Turns
    work: Work = NO_WORK
    charges: dict[TenantId, float] = field(default_factory=dict)
    """Seconds of work, by tenant."""
    started: list[SequenceStart] = field(default_factory=list)
    parts: list[SequenceStep] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    refused: list[Request] = field(default_factory=list)
