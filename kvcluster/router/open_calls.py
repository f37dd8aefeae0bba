"""The calls that are open at this router, by tenant: counted, and ended in time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from kvcluster.errors import KvClusterError, QuotaExceeded, StoreUnavailable
from kvcluster.types import TenantId


class OpenCall(Protocol):
    """A call that is being served."""

    @property
    def tenant(self) -> TenantId: ...

    def recheck(self) -> None:
        """Raises: why the call is not served any more."""
        ...

    def end_with(self, error: KvClusterError) -> None:
        """End the call with the status of `error`."""
        ...


class OpenCalls:
    """Those of one kind. Mutable; used in one event loop."""

    def __init__(self, quota: str = "open_streams") -> None:
        """`quota`: what their number is called in a refusal."""
        self._quota = quota
        self._calls: dict[TenantId, set[OpenCall]] = {}

    def count(self, tenant: TenantId) -> int:
        return len(self._calls.get(tenant, ()))

    @contextmanager
    def holding(self, call: OpenCall, limit: int) -> Iterator[None]:
        """Count the call while the block runs. Raises: QuotaExceeded, with used and allowed."""
        used = self.count(call.tenant)
        if used >= limit:
            raise QuotaExceeded(
                f"{self._quota}: {used} of the tenant's {limit}; try again when one has ended",
                metadata={"quota": self._quota, "used": str(used), "limit": str(limit)},
                retry_after_s=1.0,
            )
        self._calls.setdefault(call.tenant, set()).add(call)
        try:
            yield
        finally:
            calls = self._calls[call.tenant]
            calls.remove(call)
            if not calls:
                del self._calls[call.tenant]

    def end_those_not_served(self) -> None:
        """End each call whose credential or tenant is not served any more."""
        for call in [call for calls in self._calls.values() for call in calls]:
            try:
                call.recheck()
            except StoreUnavailable:
                # Whoever was let in goes on; nobody new is let in meanwhile.
                return
            except KvClusterError as error:
                call.end_with(error)
