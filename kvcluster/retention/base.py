"""What a retention policy is to those who count tokens: no tensor, so the engine may import it.

Time is cut into epochs by absolute position alone. A query reads the tokens that survived the
epochs before its own, and its own epoch up to itself; survivors are chosen when an epoch ends, out
of the survivors so far and the tokens of that epoch. So chunk sizes, restarts and prefix hits
change nothing, and what was dropped never comes back. The first block always survives: it holds
the attention sinks. How survivors are chosen is in `kvcluster.retention.scored`.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Final, NamedTuple, Protocol


class Need(StrEnum):
    """What a policy looks at to choose survivors."""

    NOTHING = "nothing"
    """Positions alone."""
    KEYS = "keys"
    """The keys among which it chooses: a function of the prefix."""
    QUERIES = "queries"
    """Keys, queries of the epoch that ends, and their LSE over all keys of all ranks."""


class Heads(StrEnum):
    """Which KV heads of a layer keep the same tokens."""

    OWN = "own"
    """None: each keeps what it scores highest."""
    SHARED = "shared"
    """All: a token's score is the sum of what it is to each head. Codecs that write the heads of a
    token together need that."""


class RetentionPolicy(Protocol):
    """Decides which tokens no later query may read. Layers with a window of the model's own are
    left alone: they are bounded already."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Need: ...

    def num_held(self, num_tokens: int) -> int:
        """Tokens that each KV head of a layer without window holds while the last of `num_tokens`
        tokens, which is at least one, reads: survivors and open epoch."""
        ...


POSITION_BYTES: Final = 4
"""A survivor's position, which each KV head of a layer has."""
MASS_BYTES: Final = 8
"""The attention that a token got, likewise."""


class Marks(NamedTuple):
    """How many numbers are kept beside the keys and values of one KV head."""

    positions: int
    masses: int

    @property
    def num_bytes(self) -> int:
        return self.positions * POSITION_BYTES + self.masses * MASS_BYTES


class Counts(NamedTuple):
    """How many tokens each KV head keeps of an epoch's end."""

    kept: int
    """All of them, those of the first block and the latest ones included."""
    recent: int
    """The latest ones, whatever their score."""


@dataclass(frozen=True, kw_only=True)
class Budgeted:
    """Base of the policies that keep a share of the tokens, the best by some score.

    Every layer and KV head keeps as many tokens as every other, but its own ones, unless the heads
    of a layer share them. After an epoch that ends at position n they are
    max(block_size, ceil(budget * n)), the first block among them, and a share of `recent` of them
    are the latest ones.
    """

    budget: float
    """Share of the tokens seen that stays, in (0, 1]."""
    recent: float = 0.5
    """Share of the kept tokens that are the latest ones, in [0, 1]. More of them lowers perplexity
    and loses more needles."""
    heads: Heads = Heads.OWN
    block_size: int = 64
    epoch_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(
                "budget is the share of the tokens that stays: give a number over 0 and up to 1, "
                f"not {self.budget}"
            )
        if not 0 <= self.recent <= 1:
            raise ValueError(
                "recent is the share of the kept tokens that are the latest ones: give a number "
                f"from 0 to 1, not {self.recent}"
            )
        if self.block_size < 1 or self.epoch_tokens < 1 or self.epoch_tokens % self.block_size:
            raise ValueError(
                f"epoch must be a multiple of the block size, which is {self.block_size}: give "
                f"{self.block_size} or a multiple of it, not {self.epoch_tokens}"
            )

    @property
    def carries_mass(self) -> bool:
        """See `ScoredRetention`."""
        return False

    def first_observed(self, epoch_start: int) -> int:
        """See `ScoredRetention`."""
        return epoch_start + self.epoch_tokens

    def counts(self, num_tokens: int) -> Counts:
        """What stays when an epoch ends after `num_tokens` tokens."""
        # A budget is a decimal: 0.1 of 30 tokens are 3, not the 4 that binary rounding gives.
        share = math.ceil(Fraction(repr(self.budget)) * num_tokens)
        kept = min(num_tokens, max(self.block_size, share))
        recent = math.floor(Fraction(repr(self.recent)) * kept)
        return Counts(kept, max(0, min(recent, kept - self.block_size)))

    def num_held(self, num_tokens: int) -> int:
        """See `RetentionPolicy`."""
        epoch_start = self.epoch_start(num_tokens - 1)
        return self.counts(epoch_start).kept + num_tokens - epoch_start

    def marks(self, num_tokens: int) -> Marks:
        """What each KV head has beside its tokens between two steps, when so many are computed."""
        epoch_start = self.epoch_start(num_tokens)
        kept = self.counts(epoch_start).kept
        if num_tokens > self.first_observed(epoch_start):
            return Marks(kept, kept + num_tokens - epoch_start)
        return Marks(kept, kept if self.carries_mass else 0)

    def epoch_start(self, position: int) -> int:
        """Where the epoch of a position begins."""
        return position // self.epoch_tokens * self.epoch_tokens


@dataclass(frozen=True, kw_only=True)
class SumsOfAllQueries(Budgeted):
    """Of a policy by what all queries so far gave to a token."""

    @property
    def carries_mass(self) -> bool:
        """See `ScoredRetention`."""
        return True

    def first_observed(self, epoch_start: int) -> int:
        """See `ScoredRetention`."""
        return epoch_start


@dataclass(frozen=True, kw_only=True)
class SumsOfLastQueries(Budgeted):
    """Of a policy by what the last queries of an epoch gave to a token."""

    queries: int = 32
    """Last queries of an epoch that are asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.queries <= self.epoch_tokens:
            raise ValueError(
                f"queries must be 1 to {self.epoch_tokens}, the tokens of an epoch, "
                f"not {self.queries}"
            )

    def first_observed(self, epoch_start: int) -> int:
        """See `ScoredRetention`."""
        return epoch_start + self.epoch_tokens - self.queries
