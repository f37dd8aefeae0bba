"""What both ports of a router know of tenants and of how callers prove who they are."""

from dataclasses import dataclass

from kvcluster.config_access import TlsConfig
from kvcluster.tenancy.directory import TenantDirectory
from kvcluster.tenancy.store import TenantStore
from kvcluster.tenancy.token import TokenVerifier


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Of one router with tenants."""

    store: TenantStore
    directory: TenantDirectory
    tokens: TokenVerifier | None
    """None: API keys alone."""
    tls: TlsConfig
