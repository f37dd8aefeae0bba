"""Which tenant uses how much of the engine, checked against its limits before anything is taken.

The limits come with each request (`GenerationRequest.limits`), so a change holds from the tenant's
next request on. Counts are of this engine alone.
"""

from collections.abc import Iterable, Sequence

from kvcluster.engine.api import GenerationRequest, TenantLoad
from kvcluster.engine.parts import Clock
from kvcluster.engine.request import Request, RequestState
from kvcluster.errors import QuotaExceeded
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.tenancy.token_budget import TokenBudget
from kvcluster.types import GenerationId, TenantId


class TenantUse:
    """Mutable: what one tenant has used and reserved."""

    def __init__(self) -> None:
        self.input = TokenBudget()
        self.output = TokenBudget()
        self.num_refused = 0


class TenantUses:
    """The tenants that this engine has seen. Prompt tokens count when they are sent, output tokens
    when their generation ends; until then what was declared is reserved."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._uses: dict[TenantId, TenantUse] = {}
        self._declared: dict[GenerationId, int] = {}
        """Prompt tokens of unfinished generations that are reserved and not sent yet."""

    def of(self, tenant: TenantId) -> TenantUse:
        return self._uses.setdefault(tenant, TenantUse())

    def names(self) -> set[TenantId]:
        return set(self._uses)

    def forget(self, tenant: TenantId) -> None:
        """Forget what a tenant that has no unfinished generation has used."""
        self._uses.pop(tenant, None)

    def load(
        self, tenant: TenantId, limits: TenantLimits, active: Iterable[Request], kv_bytes: int
    ) -> TenantLoad:
        """What the tenant uses now. `active`: its unfinished requests, which hold `kv_bytes`."""
        use, now = self._uses.get(tenant, TenantUse()), self._clock.monotonic()
        running = [request.state is RequestState.RUNNING for request in active]
        return TenantLoad(
            num_running=sum(running),
            num_waiting=len(running) - sum(running),
            kv_bytes=kv_bytes,
            input_tokens=use.input.used(limits.input_tokens_per_minute, now),
            output_tokens=use.output.used(limits.output_tokens_per_minute, now),
            num_refused=use.num_refused,
        )

    def check(
        self, spec: GenerationRequest, active: Iterable[Request], *, retry_after_s: float
    ) -> None:
        """Whether the tenant may begin one more generation. Takes nothing.

        Raises: QuotaExceeded, with quota, used and limit.
        """
        limits = spec.limits
        if spec.priority > limits.max_priority:
            raise _exceeded("max_priority", spec.priority, limits.max_priority, "ask for less")
        own = [request for request in active if request.spec.tenant == spec.tenant]
        _check_places(spec, own, retry_after_s)
        self._check_tokens(spec, "input", spec.input_tokens or 1, retry_after_s)
        self._check_tokens(spec, "output", spec.max_output_tokens, retry_after_s)

    def admit(self, request: Request) -> None:
        """A generation was admitted: reserve what it declared."""
        use, spec = self.of(request.spec.tenant), request.spec
        use.output.reserve(spec.max_output_tokens)
        use.input.reserve(spec.input_tokens or 0)
        self._declared[request.generation] = spec.input_tokens or 0

    def take_prompt(self, request: Request, num_tokens: int, *, retry_after_s: float) -> None:
        """So many more prompt tokens were sent. Raises: QuotaExceeded, and takes nothing."""
        use, limit = self.of(request.spec.tenant).input, request.spec.limits.input_tokens_per_minute
        declared = min(num_tokens, self._declared.get(request.generation, 0))
        if num_tokens > declared:
            self._check_tokens(request.spec, "input", num_tokens - declared, retry_after_s)
        use.give_back(declared)
        use.use(num_tokens, limit, self._clock.monotonic())
        self._declared[request.generation] -= declared

    def end(self, request: Request) -> None:
        """A generation has ended: give back what it did not use."""
        use, spec = self.of(request.spec.tenant), request.spec
        use.input.give_back(self._declared.pop(request.generation))
        use.output.give_back(spec.max_output_tokens)
        use.output.use(
            request.num_output_tokens,
            spec.limits.output_tokens_per_minute,
            self._clock.monotonic(),
        )

    def _check_tokens(
        self, spec: GenerationRequest, kind: str, tokens: int, retry_after_s: float
    ) -> None:
        use, now = self.of(spec.tenant), self._clock.monotonic()
        budget = use.input if kind == "input" else use.output
        limit = (
            spec.limits.input_tokens_per_minute
            if kind == "input"
            else spec.limits.output_tokens_per_minute
        )
        wait_s = budget.wait_s(tokens, limit, now)
        if wait_s == 0:
            return
        if tokens > limit:
            advice, wait_s = f"{tokens} more will never fit: ask for fewer", None
        else:
            advice = f"{tokens} more do not fit now"
            wait_s = retry_after_s if wait_s is None else wait_s
        raise _exceeded(
            f"{kind}_tokens_per_minute", budget.used(limit, now), limit, advice, retry_s=wait_s
        )


def _check_places(spec: GenerationRequest, own: Sequence[Request], retry_after_s: float) -> None:
    limits = spec.limits
    running, queued = limits.concurrent_generations, limits.queued_generations
    if not running:
        raise _exceeded("concurrent_generations", len(own), 0, "the tenant may run none")
    if len(own) < running + queued:
        return
    advice = "try again when one has ended"
    if not queued:
        raise _exceeded("concurrent_generations", len(own), running, advice, retry_s=retry_after_s)
    raise _exceeded("queued_generations", len(own) - running, queued, advice, retry_s=retry_after_s)


def _exceeded(
    quota: str, used: int, limit: int, advice: str, *, retry_s: float | None = None
) -> QuotaExceeded:
    return QuotaExceeded(
        f"{quota}: {used} of the tenant's {limit}; {advice}",
        metadata={"quota": quota, "used": str(used), "limit": str(limit)},
        retry_after_s=retry_s,
    )
