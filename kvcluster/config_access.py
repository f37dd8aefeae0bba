"""The settings of encryption and of identity: TLS on both ports, and tokens of an identity
provider. Files are named here and read where they are used.
"""

from dataclasses import dataclass
from urllib.parse import urlsplit

from kvcluster.errors import ConfigError

TOKEN_ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
"""Signatures by a key of which only the public half is here. No other is ever accepted: with a
shared secret, whoever can check a token can also make one."""
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """Certificates of both ports. Files are PEM; they are read again when they change."""

    certificate: str = ""
    """The server's certificate, then those between it and its authority. Empty: no TLS, and so
    loopback addresses alone."""

    key: str = ""
    """Private key of the certificate, without a passphrase."""

    client_ca: str = ""
    """Authorities whose client certificates are let in to InferenceService and ContextService;
    empty: clients need no certificate. An API key or token is asked for in either case."""

    admin_client_ca: str = ""
    """Likewise for the admin port."""

    @property
    def is_on(self) -> bool:
        return bool(self.certificate)


@dataclass(frozen=True, kw_only=True, slots=True)
class OidcConfig:
    """Tokens of an OpenID Connect provider, taken beside API keys."""

    issuer: str = ""
    """What a token's `iss` has to be. Empty: no tokens are taken."""

    audience: str = ""
    """What a token's `aud` has to name."""

    jwks: str = ""
    """The provider's public keys: a file, or an https URL."""

    algorithms: str = "RS256,ES256"
    """Signatures that are taken, with commas between."""

    tenant_claim: str = "tenant"
    """Which claim has the tenant's id."""

    role_claim: str = ""
    """Which claim has the role: inference, tenant_viewer, tenant_admin or operator. Empty: tokens
    are good for inference alone."""

    leeway_s: float = 30.0
    """How far the provider's clock may be off."""

    refresh_s: float = 300.0
    """How often the keys are read again."""

    @property
    def is_on(self) -> bool:
        return bool(self.issuer)

    @property
    def accepted_algorithms(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.algorithms.split(","))

    def __post_init__(self) -> None:
        for name in self.accepted_algorithms:
            if name not in TOKEN_ALGORITHMS:
                raise ConfigError(
                    f"oidc.algorithms: want some of {', '.join(TOKEN_ALGORITHMS)}, got "
                    f"{self.algorithms!r}"
                )
        if self.leeway_s < 0:
            raise ConfigError(f"oidc.leeway_s: want at least 0, got {self.leeway_s}")
        if self.refresh_s <= 0:
            raise ConfigError(f"oidc.refresh_s: want more than 0, got {self.refresh_s}")
        address = urlsplit(self.jwks)
        if address.scheme == "http" and address.hostname not in _LOOPBACK_HOSTS:
            raise ConfigError(
                "oidc.jwks: want https, because whoever can change the keys on their way can be "
                f"any tenant; got {self.jwks!r}"
            )


def check_together(tls: TlsConfig, oidc: OidcConfig, *, has_tenants: bool) -> None:
    """What no setting shows alone. `has_tenants`: there is a database of them. Raises:
    ConfigError."""
    if bool(tls.certificate) != bool(tls.key):
        missing = "key" if tls.certificate else "certificate"
        raise ConfigError(f"tls.{missing}: tls.certificate and tls.key are set together")
    for name in ("client_ca", "admin_client_ca"):
        if getattr(tls, name) and not tls.is_on:
            raise ConfigError(
                f"tls.{name}: client certificates need TLS: set tls.certificate and tls.key"
            )
    if oidc.is_on and not has_tenants:
        raise ConfigError("oidc.issuer: tokens name tenants, so set tenancy.database as well")
    for name in ("issuer", "audience", "jwks", "tenant_claim"):
        if (oidc.issuer or oidc.audience or oidc.jwks) and not getattr(oidc, name):
            raise ConfigError(f"oidc.{name}: issuer, audience, jwks and tenant_claim go together")
