"""What could be in the next step, tenant by tenant, and how much of it the step has room for."""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from kvcluster.engine.request import Request, RequestState
from kvcluster.engine.step_cost import CostModel, Pace, Work
from kvcluster.types import TenantId

_by_order = attrgetter("order")


@dataclass(slots=True)
class Lane:
    """One tenant's requests that could go on. Those that decode come first, then prompts."""

    decodes: deque[Request] = field(default_factory=deque)
    prompts: deque[Request] = field(default_factory=deque)
    """Of running and of waiting requests, in order."""

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prompts)

    def pop(self) -> Request:
        return (self.decodes or self.prompts).popleft()

    def drop_waiting(self) -> None:
        """No more of them can start in this step."""
        running = (each for each in self.prompts if each.state is RequestState.RUNNING)
        self.prompts = deque(running)


def lanes_of(
    running: Sequence[Request], waiting: Sequence[Request], block_size: int
) -> dict[TenantId, Lane]:
    """Of every tenant that has something to compute. Both sequences are in order."""
    lanes: dict[TenantId, Lane] = {}
    for request in running:
        if request.can_decode:
            lanes.setdefault(request.spec.tenant, Lane()).decodes.append(request)
    for request in heapq.merge(running, waiting, key=_by_order):
        if request.prefill_end(block_size) > request.num_planned:
            lanes.setdefault(request.spec.tenant, Lane()).prompts.append(request)
    return lanes


@dataclass(slots=True)
class StepBudget:
    """What a step has left. Mutable."""

    prompt_tokens: int
    """Left for prompts of all tenants together."""
    seconds: float = math.inf
    """Of the whole step."""
    spent_s: float = 0.0
    has_prompt: bool = False

    @property
    def is_spent(self) -> bool:
        return self.spent_s >= self.seconds

    def spend(self, work: Work, pace: Pace) -> None:
        self.spent_s += pace.seconds(work)

    def spend_prompt(self, num_tokens: int) -> None:
        self.prompt_tokens -= num_tokens
        self.has_prompt |= num_tokens > 0

    def tokens_after(
        self, history: int, cost: CostModel, pace: Pace, *, block_size: int, head_start_s: float
    ) -> int:
        """Prompt tokens after `history` that the step has room for: whole blocks where seconds are
        short, and at least one block while it has no prompt. Who is served on a head start of so
        many seconds may make the step that long."""
        if self.seconds == math.inf:
            return self.prompt_tokens
        left_s = max(self.seconds, head_start_s) - self.spent_s
        low, high = 0, self.prompt_tokens // block_size
        while low < high:
            middle = (low + high + 1) // 2
            if pace.seconds(cost.prefill(history, middle * block_size)) <= left_s:
                low = middle
            else:
                high = middle - 1
        if low == 0 and not self.has_prompt:
            low = 1
        return min(self.prompt_tokens, low * block_size)
