"""Which engine serves a call: model name to backend, the least loaded one where there are several.

Keeps a snapshot of every backend's status, renewed by `refresh`; holds nothing of any request.
"""

import asyncio
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from kvcluster.engine.api import Backend, BackendStatus
from kvcluster.errors import InvalidField, ModelNotFound, RankLost


class Destination(NamedTuple):
    """A backend and the name under which it serves the model."""

    model: str
    backend: Backend


class Routes:
    """The backends of this router."""

    def __init__(self, backends: Sequence[Backend], *, status_timeout_s: float = 5.0) -> None:
        self.backends = tuple(backends)
        self._status_timeout_s = status_timeout_s
        self._statuses: list[BackendStatus | None] = [None] * len(self.backends)

    @property
    def is_ready(self) -> bool:
        """Whether some backend was ready at the last refresh."""
        return any(status is not None and status.is_ready for status in self._statuses)

    async def refresh(self) -> None:
        """Ask every backend for its status; one that fails or does not answer is not ready."""
        answers = await asyncio.gather(*map(self._status_of, self.backends), return_exceptions=True)
        # Whatever went wrong there, health must go on to say so.
        self._statuses = [
            None if isinstance(answer, BaseException) else answer for answer in answers
        ]

    async def models(self) -> tuple[BackendStatus, ...]:
        """For each served model, by name, the status of a backend that has it. Raises RankLost
        when no backend answers."""
        await self._know_some_model()
        statuses = {status.model.name: status for status in self._statuses if status}
        return tuple(statuses[name] for name in sorted(statuses))

    async def resolve(self, model: str, *, request_id: str = "") -> Destination:
        """The backend for `model`; for an empty name the only model there is.

        Requests with one `request_id` meet at one backend, which knows it; others go where the
        least is waiting. Raises: ModelNotFound, InvalidField (no name, several models), RankLost.
        """
        served = [status.model.name for status in await self.models()]
        if not model and len(served) > 1:
            raise InvalidField("model", f"is empty, and several are served: {', '.join(served)}")
        name = model or served[0]
        candidates = [
            (status, index)
            for index, status in enumerate(self._statuses)
            if status is not None and status.model.name == name
        ]
        if not candidates:
            raise ModelNotFound(
                f"model {name!r} is not served here; served: {', '.join(served)}",
                metadata={"served": ", ".join(served)},
            )
        if request_id:
            _, index = max(candidates, key=lambda pair: _affinity(request_id, pair[1]))
        else:
            _, index = min(candidates, key=lambda pair: _load(pair[0]))
        return Destination(name, self.backends[index])

    async def _know_some_model(self) -> None:
        if not any(self._statuses):
            await self.refresh()
        if not any(self._statuses):
            raise RankLost("no engine answers: try again", retry_after_s=1.0)

    async def _status_of(self, backend: Backend) -> BackendStatus:
        async with asyncio.timeout(self._status_timeout_s):
            return await backend.status()


def _load(status: BackendStatus) -> tuple[bool, int]:
    return not status.is_ready, status.num_running + status.num_waiting


def _affinity(request_id: str, index: int) -> bytes:
    # Rendezvous hashing: a backend that joins or leaves moves only its own share of the ids.
    return blake2b(f"{index}:{request_id}".encode(), digest_size=8).digest()
