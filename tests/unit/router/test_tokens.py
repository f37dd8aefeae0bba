"""Tokens of an identity provider through the real ports: good ones, and every kind of forgery."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jwt
import pytest

from kvcluster.admin_client import AdminClient
from kvcluster.client import Client
from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.config_access import OidcConfig
from kvcluster.errors import ConfigError, CredentialInvalid, PermissionDenied, TenantSuspended
from kvcluster.router.front_door import FrontDoor
from kvcluster.router.token_keys import TokenKeys
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.token import TokenVerifier
from tests.identity_provider import AUDIENCE, ISSUER, IdentityProvider
from tests.unit.router.administering import INFERENCE, bootstrap
from tests.unit.router.fake_backend import FakeBackend
from tests.unit.router.serving import text_of


@pytest.fixture(scope="module")
def provider() -> IdentityProvider:
    return IdentityProvider()


@pytest.fixture
def jwks(tmp_path: Path, provider: IdentityProvider) -> Path:
    file = tmp_path / "jwks.json"
    provider.write_keys(file)
    return file


def oidc(jwks: Path, **changes: object) -> OidcConfig:
    return OidcConfig(
        issuer=ISSUER,
        audience=AUDIENCE,
        jwks=str(jwks),
        **changes,  # type: ignore[arg-type]
    )


@asynccontextmanager
async def served(folder: Path, config: OidcConfig) -> AsyncIterator[FrontDoor]:
    """A router with tenants red and blue."""
    database = folder / "tenants.sqlite"
    secret = bootstrap(database)
    door = FrontDoor(
        [FakeBackend()],
        RouterConfig(listen="127.0.0.1:0"),
        TenancyConfig(database=str(database), admin_listen="127.0.0.1:0"),
        oidc=config,
    )
    try:
        await door.start()
        async with AdminClient(door.admin_address, api_key=secret) as admin:
            for tenant in ("red", "blue"):
                await admin.ask(pb.CreateTenantRequest(tenant_id=tenant))
        yield door
    finally:
        await door.stop(grace_s=0)


@pytest.fixture
async def door(tmp_path: Path, jwks: Path) -> AsyncIterator[FrontDoor]:
    async with served(tmp_path, oidc(jwks, role_claim="role", leeway_s=0.0)) as door:
        yield door


def good(provider: IdentityProvider, **changes: object) -> str:
    return provider.token(**{"role": "inference", **changes})  # type: ignore[arg-type]


async def generated_as(door: FrontDoor, token: str) -> str:
    """The tenant that a generation of this token belongs to."""
    async with Client(door.address, api_key=token) as client:
        events = [e async for e in client.generate(prompt="hello", max_output_tokens=5)]
        assert text_of(events) == "hello"
        return events[0].generation.split("/")[1]


async def refused(door: FrontDoor, token: str) -> str:
    """The whole text of the refusal."""
    async with Client(door.address, api_key=token) as client:
        with pytest.raises(CredentialInvalid) as raised:
            await client.models()
    return f"{raised.value.message} {raised.value.metadata}"


@pytest.mark.parametrize(("kid", "algorithm"), [("rsa", "RS256"), ("ec", "ES256")])
async def test_a_token_speaks_for_the_tenant_in_its_claim(
    kid: str, algorithm: str, door: FrontDoor, provider: IdentityProvider
) -> None:
    for tenant in ("red", "blue"):
        token = good(provider, kid=kid, algorithm=algorithm, tenant=tenant)
        assert await generated_as(door, token) == tenant


def with_header(token: str, **header: object) -> str:
    text = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
    return ".".join([text, *token.split(".")[1:]])


def hs256(provider: IdentityProvider, key: bytes) -> str:
    """Signed with what everybody knows, as if it were a secret. PyJWT refuses to make such one."""
    import hashlib
    import hmac

    head, body, _ = with_header(good(provider), alg="HS256", kid="rsa", typ="JWT").split(".")
    mac = hmac.new(key, f"{head}.{body}".encode(), hashlib.sha256).digest()
    return f"{head}.{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def forgeries(provider: IdentityProvider) -> dict[str, str]:
    now = int(time.time())
    stranger = IdentityProvider()
    own_key = jwt.algorithms.RSAAlgorithm.to_jwk(stranger.rsa.public_key(), as_dict=True)
    head, body, signature = good(provider).split(".")
    none = with_header(good(provider), alg="none", kid="rsa").rsplit(".", 1)[0] + "."
    return {
        "alg none": none,
        "alg NoNe": with_header(none, alg="NoNe", kid="rsa"),
        "public key as a shared secret": hs256(provider, provider.public_pem),
        "public key as a shared secret, stripped": hs256(provider, provider.public_pem.strip()),
        "the shared secret that the set has": hs256(
            provider, b"secret-secret-secret-secret-secret"
        ),
        "signed by somebody else": good(stranger),
        "brings its own key": jwt.encode(
            provider.claims(role="inference"),
            stranger.rsa,
            "RS256",
            headers={"kid": "rsa", "jwk": own_key, "jku": "https://evil.example/jwks"},
        ),
        "another signature of the same key": good(provider, algorithm="RS512"),
        "an elliptic signature under the RSA key's id": jwt.encode(
            provider.claims(role="inference"), provider.ec, "ES256", headers={"kid": "rsa"}
        ),
        "a key for encryption": good(provider, kid="enc"),
        "an unknown key": good(provider, kid="../../dev/null"),
        "no key id": jwt.encode(provider.claims(role="inference"), provider.rsa, "RS256"),
        "expired": good(provider, exp=now - 1),
        "without an end": good(provider, exp=None),
        "not yet valid": good(provider, nbf=now + 60),
        "issued in the future": good(provider, iat=now + 600),
        "another audience": good(provider, aud="other"),
        "without audience": good(provider, aud=None),
        "another issuer": good(provider, iss="https://evil.example"),
        "without issuer": good(provider, iss=None),
        "without subject": good(provider, sub=None),
        "without tenant": good(provider, tenant=None),
        "a list of tenants": good(provider, tenant=["red", "blue"]),
        "an unknown tenant": good(provider, tenant="green"),
        "the operators, with a role for tenants": good(provider, tenant="operators"),
        "a tenant, with the operators' role": good(provider, role="operator"),
        "an unknown role": good(provider, role="root"),
        "without role": good(provider, role=None),
        "a changed claim": f"{head}.{_with_tenant(body, 'blue')}.{signature}",
        "without signature": f"{head}.{body}.",
        "two parts": f"{head}.{body}",
        "no token": "a.b.c",
    }


def _with_tenant(body: str, tenant: str) -> str:
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    text = json.dumps(claims | {"tenant": tenant}).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


async def test_every_forgery_is_refused_with_one_answer(
    door: FrontDoor, provider: IdentityProvider
) -> None:
    answers = {name: await refused(door, token) for name, token in forgeries(provider).items()}

    assert len(answers) > 30
    assert len(set(answers.values())) == 1, answers
    assert await generated_as(door, good(provider)) == "red"


async def test_without_a_claim_for_roles_tokens_generate_and_administer_nothing(
    tmp_path: Path, jwks: Path, provider: IdentityProvider
) -> None:
    async with served(tmp_path, oidc(jwks)) as door:
        token = provider.token(role="tenant_admin")
        assert await generated_as(door, token) == "red"
        async with AdminClient(door.admin_address, api_key=token) as admin:
            with pytest.raises(PermissionDenied, match="role"):
                await admin.ask(pb.GetTenantRequest(name="tenants/red"))


async def test_a_token_with_a_role_administers_its_own_tenant_and_the_log_says_who(
    door: FrontDoor, provider: IdentityProvider
) -> None:
    token = good(provider, role="tenant_admin", sub="al\nice@example.org")
    async with AdminClient(door.admin_address, api_key=token) as admin:
        await admin.ask(
            pb.CreateApiKeyRequest(parent="tenants/red", api_key=pb.ApiKey(role=INFERENCE))
        )
        with pytest.raises(PermissionDenied):
            await admin.ask(pb.GetTenantRequest(name="tenants/blue"))
        listed = await admin.ask(pb.ListAuditEventsRequest(parent="tenants/red"))
    assert isinstance(listed, pb.ListAuditEventsResponse)
    assert [event.principal for event in listed.audit_events][-1] == "oidc:alice@example.org"


async def test_tokens_of_a_suspended_or_deleted_tenant_are_good_for_nothing(
    door: FrontDoor, provider: IdentityProvider
) -> None:
    operator = good(provider, tenant="operators", role="operator")
    async with AdminClient(door.admin_address, api_key=operator) as admin:
        await admin.ask(pb.SuspendTenantRequest(name="tenants/red"))
        async with Client(door.address, api_key=good(provider)) as client:
            with pytest.raises(TenantSuspended):
                await client.models()
        await admin.ask(pb.DeleteTenantRequest(name="tenants/red"))
    await refused(door, good(provider))


async def test_keys_that_the_provider_has_replaced_are_found_when_a_token_names_one(
    jwks: Path, provider: IdentityProvider
) -> None:
    now = [0.0]
    config = oidc(jwks, refresh_s=1000.0)
    verifier = TokenVerifier(config)
    keys = TokenKeys(config, verifier, monotonic=lambda: now[0])
    await keys.start()
    later = IdentityProvider()
    token = jwt.encode(later.claims(), later.rsa, "RS256", headers={"kid": "rsa2"})
    text = jwks.read_text()
    later.write_keys(jwks)
    jwks.write_text(jwks.read_text().replace('"rsa"', '"rsa2"'))

    def is_good(token: str) -> bool:
        try:
            return verifier.holder(token).tenant == "red"
        except CredentialInvalid:
            return False

    found = [is_good(token)]
    for now[0] in (1.0, 20.0):  # soon after a look, nobody is asked again
        await keys.look()
        found.append(is_good(token))
    assert found == [False, False, True]
    assert not is_good(provider.token())  # its key was withdrawn

    jwks.write_text("not JSON")
    now[0] += 2000
    await keys.look()
    assert is_good(token)  # what was read last goes on
    jwks.write_text(text)
    now[0] += 2000
    await keys.look()
    assert is_good(provider.token())


@pytest.mark.parametrize(
    "text", ["", "[]", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "YQ"}]}']
)
async def test_a_file_without_public_keys_keeps_the_server_from_starting(
    text: str, tmp_path: Path
) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"oidc\.jwks: .*"):
        async with served(tmp_path, oidc(file)):
            pass


async def test_keys_are_read_from_a_url_and_a_redirect_is_not_followed(
    jwks: Path, provider: IdentityProvider
) -> None:
    answers = {
        "/jwks": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + jwks.read_bytes(),
        "/moved": b"HTTP/1.1 302 Found\r\nLocation: /jwks\r\nConnection: close\r\n\r\n",
    }

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[request.split()[1].decode()])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    found = {}
    for path in answers:
        config = OidcConfig(issuer=ISSUER, audience=AUDIENCE, jwks=f"http://127.0.0.1:{port}{path}")
        verifier = TokenVerifier(config)
        await TokenKeys(config, verifier).start()
        found[path] = set(verifier.keys)
    server.close()
    await server.wait_closed()

    assert found == {"/jwks": {"rsa", "ec"}, "/moved": set()}
