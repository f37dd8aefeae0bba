"""Who is calling: the tenant comes from a call's credential and from nothing else."""

from collections.abc import Iterable
from typing import Protocol

from kvcluster.types import DEFAULT_TENANT, TenantId

CallMetadata = Iterable[tuple[str, str | bytes]]


class Authenticator(Protocol):
    """Turns a call's metadata into its tenant."""

    def authenticate(self, metadata: CallMetadata) -> TenantId:
        """The tenant of the credential in `metadata`. Raises KvClusterError to refuse the call."""
        ...


class InsecureLocal:
    """Everybody is the default tenant. The server binds it to loopback addresses only."""

    def authenticate(self, metadata: CallMetadata) -> TenantId:  # noqa: ARG002  protocol
        return DEFAULT_TENANT
