"""Secrets of API keys: how they are made, and how one is compared with what is stored of it.

A secret is `kvc_` + 16 hexadecimal digits that find its record + `_` + 256 random bits. So much
randomness cannot be guessed, and a fast hash of it cannot be searched: SHA-256 is stored, which a
slow password hash would not make safer.
"""

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

_SECRET = re.compile(r"kvc_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_NO_DIGEST = hashlib.sha256(b"").hexdigest()
_RANDOM_BYTES = 32


class NewSecret(NamedTuple):
    """A secret that has just been made. `text` is shown once and never stored."""

    text: str
    uid: str
    digest: str


def make_secret() -> NewSecret:
    uid = secrets.token_hex(8)
    text = f"kvc_{uid}_{secrets.token_urlsafe(_RANDOM_BYTES)}"
    return NewSecret(text, uid, _digest(text))


def uid_in(text: str) -> str | None:
    """What finds the record of the secret; None: it is none of ours."""
    found = _SECRET.fullmatch(text)
    return found[1] if found else None


def is_secret(text: str, digest: str | None) -> bool:
    """Whether `digest` is stored of this secret. Takes as long when there is no such record."""
    return hmac.compare_digest(_digest(text), digest or _NO_DIGEST) and digest is not None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
