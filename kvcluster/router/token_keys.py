"""Reads the identity provider's public keys, at the start and again and again, so that tokens are
checked without a question to anybody."""

import asyncio
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from kvcluster.config_access import OidcConfig
from kvcluster.errors import ConfigError
from kvcluster.log import get_logger
from kvcluster.tenancy.token import TokenVerifier, public_keys

_MAX_BYTES = 1024 * 1024
_TIMEOUT_S = 10.0
_LOOK_INTERVAL_S = 1.0
_MISSED_PAUSE_S = 10.0
"""A token may name a key that does not exist: that must not have us ask the provider each time."""

_log = get_logger(__name__)


class TokenKeys:
    """Keeps the keys of one verifier fresh. Used in one event loop."""

    def __init__(
        self,
        config: OidcConfig,
        verifier: TokenVerifier,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._verifier = verifier
        self._monotonic = monotonic
        self._read_at = 0.0

    async def start(self) -> None:
        """Read the keys. A provider that does not answer is asked again later, and until then no
        token is good. Raises: ConfigError for a file that cannot be used."""
        try:
            await self._read()
        except (OSError, ConfigError) as error:
            if not _is_url(self._config.jwks):
                reason = f"cannot be read: {error}" if isinstance(error, OSError) else str(error)
                raise ConfigError(f"oidc.jwks: {self._config.jwks} {reason}") from error
            _log.warning("token_keys_not_read", error=type(error).__name__)

    async def run(self) -> None:
        """Read them again when it is time, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """Read the keys, if it is time or a token named one that is not known."""
        age_s = self._monotonic() - self._read_at
        is_missed = self._verifier.has_missed and age_s >= _MISSED_PAUSE_S
        if age_s < self._config.refresh_s and not is_missed:
            return
        try:
            await self._read()
        except (OSError, ConfigError) as error:
            # The keys that were read last go on being good.
            _log.warning("token_keys_not_read", error=type(error).__name__)

    async def _read(self) -> None:
        self._read_at = self._monotonic()
        self._verifier.has_missed = False
        self._verifier.keys = public_keys(await asyncio.to_thread(_fetch, self._config.jwks))


def _is_url(source: str) -> bool:
    return source.startswith(("https://", "http://"))


def _fetch(source: str) -> bytes:
    """Raises: OSError."""
    if not _is_url(source):
        return Path(source).read_bytes()
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(source, timeout=_TIMEOUT_S) as answer:
        text: bytes = answer.read(_MAX_BYTES)
        return text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The operator named the place; another may not be encrypted."""

    def redirect_request(self, *_: object) -> None:
        """None: the answer is an error of its own."""
