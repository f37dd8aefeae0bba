"""The root key: wraps tenants' data keys in the database, and signs the audit log.

It lives outside the database, so that a copy of the database opens nothing, and whoever rewrites it
is found. Losing the root key loses what the data keys sealed; nothing else depends on it.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvcluster.errors import ConfigError, StoreUnavailable
from kvcluster.types import TenantId

KEY_BYTES = 32
_NONCE_BYTES = 12
_VARIABLE = "env:"
_DIGITS = "hex:"


class RootKey:
    """One for every router of a cluster. Immutable."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: 32 random bytes."""
        assert len(secret) == KEY_BYTES
        self._wrapping = AESGCM(_derived(secret, b"kvcluster data keys"))
        self.audit_key = _derived(secret, b"kvcluster audit log")
        """Signs the events of the audit log."""
        self.fingerprint = _derived(secret, b"kvcluster fingerprint")
        """Tells root keys apart, and nothing of the secret."""

    def wrap(self, tenant: TenantId, version: int, key: bytes) -> bytes:
        """The data key sealed, for this tenant and version and no other."""
        # Random nonces are safe for 2^32 keys under one root key (NIST SP 800-38D, 8.3).
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._wrapping.encrypt(nonce, key, _place(tenant, version))

    def unwrap(self, tenant: TenantId, version: int, wrapped: bytes) -> bytes:
        """Raises: StoreUnavailable when it was wrapped for another place, or changed."""
        nonce, sealed = wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:]
        try:
            return self._wrapping.decrypt(nonce, sealed, _place(tenant, version))
        except (InvalidTag, ValueError) as error:
            raise StoreUnavailable(
                f"data key {version} of tenant {tenant} was changed in the database: restore it "
                "from a copy, or rotate the tenant's key and give up what was sealed"
            ) from error


def with_variable(setting: str, environ: Mapping[str, str]) -> str:
    """The setting with the digits themselves where it names a variable. Only the command line reads
    variables; the router may run on another machine."""
    if not setting.startswith(_VARIABLE):
        return setting
    return _DIGITS + environ.get(setting.removeprefix(_VARIABLE), "")


def read_root_key(setting: str) -> RootKey | None:
    """The root key that `tenancy.root_key` names, or after `with_variable` has; None: it names
    none. Raises: ConfigError."""
    if not setting:
        return None
    named, text = "the variable", setting.removeprefix(_DIGITS)
    if not setting.startswith(_DIGITS):
        named = setting
        try:
            text = Path(setting).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tenancy.root_key: {setting} cannot be read") from error
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise ConfigError(
            f"tenancy.root_key: want {2 * KEY_BYTES} hexadecimal digits in {named}, such as "
            "`openssl rand -hex 32` makes"
        )
    return RootKey(secret)


def signature(key: bytes, *fields: object) -> bytes:
    """HMAC-SHA256 over the fields. msgpack marks where each ends."""
    return hmac.new(key, msgspec.msgpack.encode(fields), hashlib.sha256).digest()


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=purpose).derive(secret)


def _place(tenant: TenantId, version: int) -> bytes:
    return msgspec.msgpack.encode(["data key", tenant, version])
