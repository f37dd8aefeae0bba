"""How many generations a tenant may run at one time, as the scheduler sees it."""

from collections import Counter
from collections.abc import Iterable

from kvcluster.engine.request import Request


class Turns:
    """Whose turn it may be in one plan: no tenant runs more generations than it may."""

    def __init__(self, running: Iterable[Request]) -> None:
        self._running = Counter(request.spec.tenant for request in running)

    def are_left(self, request: Request) -> bool:
        """Whether its tenant may run one more."""
        spec = request.spec
        return self._running[spec.tenant] < spec.limits.concurrent_generations

    def take(self, request: Request) -> None:
        self._running[request.spec.tenant] += 1
