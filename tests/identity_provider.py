"""An OpenID Connect provider for tests: signs tokens and publishes its keys."""

import json
import time
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

ISSUER = "https://login.example"
AUDIENCE = "kvcluster"


class IdentityProvider:
    """One RSA key and one of an elliptic curve, ids `rsa` and `ec`."""

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())

    def write_keys(self, file: Path) -> None:
        """Publish the public keys, and one that is for encryption."""
        rsa_key = jwt.algorithms.RSAAlgorithm.to_jwk(self.rsa.public_key(), as_dict=True)
        ec_key = jwt.algorithms.ECAlgorithm.to_jwk(self.ec.public_key(), as_dict=True)
        keys = [
            {**rsa_key, "kid": "rsa", "use": "sig", "alg": "RS256"},
            {**ec_key, "kid": "ec"},
            {**rsa_key, "kid": "enc", "use": "enc"},
            {"kty": "oct", "kid": "shared", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"},
        ]
        file.write_text(json.dumps({"keys": keys}))

    def claims(self, **changes: object) -> dict[str, object]:
        """Of a good token for tenant red; a claim that is None is left out."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "alice",
            "iat": now,
            "exp": now + 300,
            "tenant": "red",
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, *, kid: str = "rsa", algorithm: str = "RS256", **changes: object) -> str:
        key = self.rsa if kid != "ec" else self.ec
        return jwt.encode(self.claims(**changes), key, algorithm, headers={"kid": kid})

    @property
    def public_pem(self) -> bytes:
        return self.rsa.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
