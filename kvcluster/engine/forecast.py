"""When requests will have their first token: the queues seen at the speed of recent steps."""

from collections.abc import Iterable

from kvcluster.engine.api import GenerationRequest, Progress
from kvcluster.engine.estimator import SpeedEstimator
from kvcluster.engine.generation import Generation
from kvcluster.engine.request import Request
from kvcluster.engine.scheduler import Scheduler
from kvcluster.types import TenantId

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0


class Forecast:
    """Reads the scheduler's queues and the estimator; changes nothing."""

    def __init__(self, scheduler: Scheduler, estimator: SpeedEstimator) -> None:
        self._scheduler = scheduler
        self._estimator = estimator

    def first_token_s(self, spec: GenerationRequest) -> float | None:
        """Seconds until a request's first token if it came now with its whole prompt; None while
        its length or the speed is not known."""
        if spec.input_tokens is None:
            return None
        prompt_s = self._estimator.prefill_s(0, spec.input_tokens)
        ahead_s = self._prefill_s(
            request
            for request in self._queued()
            if request.spec.tenant == spec.tenant and request.spec.priority >= spec.priority
        )
        if prompt_s is None or ahead_s is None:
            return None
        return self._beside_others_s(spec, prompt_s + ahead_s)

    def retry_after_s(self) -> float:
        """When a place in the queue is likely to be free."""
        queued = self._queued()
        backlog_s = self._prefill_s(queued) or 0.0
        return min(max(backlog_s / max(1, len(queued)), MIN_RETRY_S), MAX_RETRY_S)

    def progress(self, generation: Generation) -> Progress:
        request = generation.request
        is_known = request.is_prompt_complete or request.spec.input_tokens is not None
        total = request.known_length
        return Progress(
            phase=generation.phase,
            done_tokens=min(request.num_computed, total),
            total_tokens=total if is_known else 0,
            cached_tokens=min(request.num_cached, total),
            estimated_remaining_s=(
                self._remaining_s(request) if is_known and not generation.has_first_token else None
            ),
        )

    def _remaining_s(self, request: Request) -> float | None:
        own_s = self._prefill_s(
            other
            for other in self._queued()
            if other.spec.tenant == request.spec.tenant and other.order <= request.order
        )
        return None if own_s is None else self._beside_others_s(request.spec, own_s)

    def _beside_others_s(self, spec: GenerationRequest, own_s: float) -> float:
        """How long so many seconds of the tenant's own work take, while each other tenant gets what
        its weight says, or all that it wants where that is less."""
        by_tenant: dict[TenantId, list[Request]] = {}
        for request in self._queued():
            if request.spec.tenant != spec.tenant:
                by_tenant.setdefault(request.spec.tenant, []).append(request)
        total_s = own_s
        for requests in by_tenant.values():
            wanted_s = self._prefill_s(requests) or 0.0
            weight = requests[-1].spec.limits.weight / spec.limits.weight
            total_s += min(wanted_s, own_s * weight)
        return total_s

    def _queued(self) -> list[Request]:
        return [
            request
            for request in (*self._scheduler.running, *self._scheduler.waiting)
            if not request.num_output_tokens
        ]

    def _prefill_s(self, requests: Iterable[Request]) -> float | None:
        total_s = 0.0
        for request in requests:
            end = request.known_length
            own_s = self._estimator.prefill_s(min(request.num_computed, end), end)
            if own_s is None:
                return None
            total_s += own_s
        return total_s
