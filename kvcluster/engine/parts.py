"""What an engine is made of, and what it tells of itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcluster.cache.partition import PartitionStatistics
from kvcluster.cache.partitions import CachePartitions
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.draft import RouteChoice
from kvcluster.engine.estimator import EstimatorStatistics
from kvcluster.engine.prefix_keys import process_secrets
from kvcluster.engine.store_parts import StoreParts
from kvcluster.engine.text import Tokenizer
from kvcluster.policy import Menu
from kvcluster.policy_bounds import MeasuredRecipe
from kvcluster.types import ModelSpec, Policy, TenantId


class Clock(Protocol):
    """Where the engine takes the time from, in seconds."""

    def monotonic(self) -> float: ...

    def unix(self) -> float: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineParts:
    """What an engine is made of."""

    spec: ModelSpec
    cache: CacheConfig
    config: EngineConfig
    partitions: CachePartitions
    stores: StoreParts | None = None
    """Keep contexts off the GPUs; None: they are on them alone."""
    choose_route: RouteChoice
    menu: Menu
    """What a policy may name."""
    refusal: Callable[[Policy], str | None]
    """Why this model cannot serve a policy of the menu; None: it can."""
    recipes: Sequence[MeasuredRecipe] = ()
    """What was measured on this model, for policies that are given as a bound."""
    unmeasured: str = ""
    """Why what a calibration measured does not count here, so that there are no recipes; empty:
    it does, or there is none."""
    default_policy: str = ""
    """Of requests that name none; empty: exact storage."""
    tenant_policies: Mapping[TenantId, str] = field(default_factory=dict)
    """Likewise for single tenants: these come first."""
    tokenizer: Tokenizer | None
    """None: the model serves token ids only."""
    clock: Clock
    new_id: Callable[[], str]
    """Gives an id that was never used before and cannot be guessed."""
    secret_of: Callable[[TenantId], bytes] = field(default_factory=process_secrets)
    """Keys the names of a tenant's blocks."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of the engine."""

    epoch: int
    num_steps: int
    """Planned in this epoch."""
    num_in_flight: int
    num_running: int
    num_waiting: int
    num_retained: int
    partition: PartitionStatistics
    idle_on_ranks: tuple[int, ...]
    """Per rank, blocks that are kept for later requests and come free when they are wanted."""
    speed: EstimatorStatistics
