"""Tokens of an OpenID Connect provider: which are good, and whom they speak for.

Only public keys are ever held here, and only signatures by a private key are accepted, so that
`alg: none` and a signature made with the public key as a shared secret (RFC 8725, 2.1) find nothing
to be checked against. What a token's header says of keys besides `kid` is not looked at.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jwt

from kvcluster.config_access import OidcConfig
from kvcluster.errors import ConfigError
from kvcluster.tenancy.directory import invalid_credential
from kvcluster.tenancy.tenant import OPERATORS, KeyRole
from kvcluster.types import TenantId

_REQUIRED = ("exp", "iss", "aud", "sub")
_KEY_TYPE = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
"""By the first letters of a signature's name."""
_MAX_SUBJECT_CHARS = 100
_MAX_TOKEN_CHARS = 16 * 1024


class TokenHolder(NamedTuple):
    """Whom a good token speaks for."""

    tenant: TenantId
    role: KeyRole
    subject: str
    """Who it is at the provider, safe to write into a log."""


class PublicKey(NamedTuple):
    """One signing key of the provider."""

    key_type: str
    algorithm: str
    """The only one that it is for; empty: any of its type."""
    key: Any


PublicKeys = Mapping[str, PublicKey]
"""By key id."""


def public_keys(text: bytes) -> PublicKeys:
    """The signing keys of a JSON Web Key Set. Shared secrets and keys for encryption are left out.

    Raises: ConfigError when it is no such set, or none of its keys can be used.
    """
    try:
        listed = json.loads(text)["keys"]
        found = {str(each.get("kid", "")): each for each in listed if _is_for_signatures(each)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("oidc.jwks: want a JSON Web Key Set, an object with `keys`") from error
    keys = {}
    for kid, record in found.items():
        try:
            key = jwt.PyJWK.from_dict(record).key
        except (jwt.PyJWTError, ValueError, KeyError, TypeError):
            continue  # of a kind that this version does not know
        keys[kid] = PublicKey(record["kty"], record.get("alg", ""), key)
    if not keys:
        raise ConfigError("oidc.jwks: has no public key for signatures")
    return keys


def _is_for_signatures(record: Mapping[str, Any]) -> bool:
    return record.get("kty") in _KEY_TYPE.values() and record.get("use", "sig") == "sig"


class TokenVerifier:
    """Mutable: `keys` are replaced when the provider has changed them."""

    def __init__(self, config: OidcConfig) -> None:
        self.keys: PublicKeys = {}
        self.has_missed = False
        """A token named a key that is not here: the provider may have a new one."""
        self._config = config

    def holder(self, token: str) -> TokenHolder:
        """Whom the token speaks for. Raises: CredentialInvalid; why, is not told."""
        if len(token) > _MAX_TOKEN_CHARS:
            raise invalid_credential()
        try:
            header = jwt.get_unverified_header(token)
            claims = jwt.decode(
                token,
                self._key(header),
                algorithms=[header["alg"]],
                audience=self._config.audience,
                issuer=self._config.issuer,
                leeway=self._config.leeway_s,
                options={"require": list(_REQUIRED)},
            )
        except (jwt.PyJWTError, ValueError, KeyError, TypeError) as error:
            raise invalid_credential() from error
        return self._holder_in(claims)

    def _key(self, header: Mapping[str, Any]) -> Any:
        """The key that the token has to be signed with. Raises: CredentialInvalid."""
        algorithm, kid = header.get("alg"), header.get("kid", "")
        if algorithm not in self._config.accepted_algorithms or not isinstance(kid, str):
            raise invalid_credential()
        found = self.keys.get(kid)
        if found is None and not kid and len(self.keys) == 1:
            (found,) = self.keys.values()
        if found is None:
            self.has_missed = True
            raise invalid_credential()
        fits = found.key_type == _KEY_TYPE[algorithm[:2]]
        if not fits or found.algorithm not in ("", algorithm):
            raise invalid_credential()
        return found.key

    def _holder_in(self, claims: Mapping[str, Any]) -> TokenHolder:
        tenant = claims.get(self._config.tenant_claim)
        role: object = KeyRole.INFERENCE
        if self._config.role_claim:
            role = claims.get(self._config.role_claim)
        if not isinstance(tenant, str) or role not in tuple(KeyRole):
            raise invalid_credential()
        # As with API keys: whoever administers all tenants belongs to none.
        if (tenant == OPERATORS) != (role == KeyRole.OPERATOR):
            raise invalid_credential()
        return TokenHolder(TenantId(tenant), KeyRole(str(role)), _subject(claims["sub"]))


def _subject(text: str) -> str:
    """Nothing in it may look like another field or line of a log."""
    kept = "".join(char for char in text if char.isalnum() or char in "@._-|:")
    return kept[:_MAX_SUBJECT_CHARS]
