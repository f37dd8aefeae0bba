"""What a newcomer waits for: the steps in flight. Where several tenants are about, a step is only
so long, and is planned only shortly before the one in flight is done:

    in flight      ├───────── step_s ─────────┤
    the next one                    ├─ ahead_s ┼───────── step_s ─────────┤
                                    planned    begins

Who comes just after that waits for the rest of the one and for the whole of the other; who comes
before is part of the other. Both together are seven tenths of `first_token_wait_s`: the rest is for
steps that take longer than expected.
"""

from collections.abc import Iterable

from kvcluster.config import EngineConfig
from kvcluster.engine.lanes import Lane, StepBudget
from kvcluster.engine.step_cost import Pace

_STEP = 0.5
"""Of `first_token_wait_s`."""
_AHEAD = 0.2
"""Of `first_token_wait_s`: for the way of a plan to the ranks and for steps that take less time
than expected, so that the ranks need not wait for a plan."""
_HEAD_START_WAITS = 4
"""Longest step, in `first_token_wait_s`, of a tenant that is served on its head start."""


class NewcomerWait:
    """Bounds of steps, in seconds as they are expected. What is not known yet is not bounded."""

    def __init__(self, engine: EngineConfig, *, block_size: int) -> None:
        self._block_size = block_size
        self._chunk_tokens = max(engine.prefill_chunk_tokens, block_size)
        self._wait_s = engine.first_token_wait_s
        self._is_ahead = engine.lookahead_steps > 1

    @property
    def step_s(self) -> float:
        """Of a step, where other tenants may come."""
        return _STEP * self._wait_s if self._is_ahead else self._wait_s

    @property
    def longest_head_start_s(self) -> float:
        """Of a step for a tenant that asks for little: its short requests are not cut into many
        steps, but neither may they hold others up for long."""
        return _HEAD_START_WAITS * self._wait_s

    def plan_from(self, done_at: float) -> float:
        """When the next step is planned, where other tenants may come and all that is in flight is
        expected to be done at `done_at`."""
        return done_at - _AHEAD * self._wait_s

    def budget(self, lanes: Iterable[Lane], pace: Pace, *, is_shared: bool) -> StepBudget:
        """Of the next step. `is_shared`: other tenants may come."""
        num_decodes = sum(len(lane.decodes) for lane in lanes)
        # Decodes never starve prefill: a whole block always fits.
        tokens = max(self._chunk_tokens - num_decodes, self._block_size)
        if not is_shared or not pace.is_known:
            return StepBudget(tokens)
        # At least half of a step is work, however much it takes to have one.
        return StepBudget(tokens, seconds=max(self.step_s - pace.fixed_s, pace.fixed_s))
