"""Attacks on who a caller is: held by our server, seen where a server is broken."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvcluster.audit import identity
from kvcluster.audit.attack import Attack, Verdict
from kvcluster.audit.scene import staged
from kvcluster.config_access import OidcConfig
from kvcluster.router import auth
from kvcluster.router.auth import Caller, CallMetadata, Credentials
from kvcluster.tenancy import directory
from kvcluster.tenancy.directory import TenantDirectory
from kvcluster.tenancy.tenant import ApiKey, KeyRole, Tenant
from kvcluster.tenancy.token import TokenHolder, TokenVerifier
from kvcluster.types import TenantId
from tests.attacks.attacked import attacked, outcome_of, real_engine
from tests.identity_provider import AUDIENCE, ISSUER, IdentityProvider
from tests.unit.router.fake_backend import FakeBackend

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("attack", identity.ATTACKS, ids=lambda attack: attack.name)
async def test_our_server_holds(attack: Attack, tmp_path: Path) -> None:
    outcome = await outcome_of(attack, tmp_path)

    assert outcome.verdict is Verdict.HELD, outcome


async def test_a_server_that_serves_without_credential_is_found(tmp_path: Path) -> None:
    outcome = await outcome_of(identity.no_credential, tmp_path, FakeBackend(), insecure_local=True)

    assert outcome.verdict is Verdict.BREACH
    assert "TenantService.ListTenants" in outcome.found


async def test_a_server_that_looks_at_half_of_a_secret_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(directory, "is_secret", lambda text, digest: digest is not None)

    outcome = await outcome_of(identity.forged_keys, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
    assert "OK" in outcome.found


async def test_a_server_that_tells_nearly_right_secrets_from_wrong_ones_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    refuse, texts = directory.invalid_credential, iter(range(1000))

    def numbered() -> Exception:
        error = refuse()
        error.message += f" ({next(texts)})"
        return error

    monkeypatch.setattr(directory, "invalid_credential", numbered)

    outcome = await outcome_of(identity.forged_keys, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
    assert "differ" in outcome.found


async def test_a_server_that_takes_expired_keys_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    check = TenantDirectory._tenant_of

    def unending(self: TenantDirectory, key: ApiKey) -> Tenant:
        import msgspec

        return check(self, msgspec.structs.replace(key, expire_time_s=None))

    monkeypatch.setattr(TenantDirectory, "_tenant_of", unending)

    outcome = await outcome_of(identity.expired_key, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH


async def test_a_server_that_learns_of_revocations_late_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    def forgetful(self: TenantDirectory, key: ApiKey) -> Tenant:
        return self._tenants[key.tenant]

    monkeypatch.setattr(TenantDirectory, "_tenant_of", forgetful)

    outcome = await outcome_of(identity.revoked_key, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
    assert outcome.measured["last_s"] > identity.REVOKED_WITHIN_S


async def test_a_server_that_takes_keys_of_deleted_tenants_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(TenantDirectory, "_tenant_of", lambda self, key: self._tenants[key.tenant])

    outcome = await outcome_of(identity.key_of_a_deleted_tenant, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH


async def test_a_server_on_which_every_role_does_everything_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    create = Credentials.__init__

    def lax(self: Credentials, where: TenantDirectory, **given: object) -> None:
        create(self, where, **given | {"roles": tuple(KeyRole)})  # type: ignore[arg-type]

    monkeypatch.setattr(Credentials, "__init__", lax)

    outcome = await outcome_of(identity.wrong_role, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
    assert "ListModels" in outcome.found


async def test_a_server_that_believes_metadata_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    find = Credentials.authenticate

    def believing(self: Credentials, metadata: CallMetadata) -> Caller:
        said = {key: value for key, value in metadata if isinstance(value, str)}
        caller = find(self, metadata)
        return replace(caller, tenant=TenantId(said.get("x-tenant-id", caller.tenant)))

    monkeypatch.setattr(auth.Credentials, "authenticate", believing)

    outcome = await outcome_of(identity.spoofed_tenant, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH


@pytest.fixture
def provider(tmp_path: Path) -> tuple[IdentityProvider, OidcConfig]:
    made = IdentityProvider()
    made.write_keys(tmp_path / "jwks.json")
    config = OidcConfig(issuer=ISSUER, audience=AUDIENCE, jwks=str(tmp_path / "jwks.json"))
    return made, config


async def test_forged_tokens_are_refused_where_good_ones_are_taken(
    tmp_path: Path, provider: tuple[IdentityProvider, OidcConfig]
) -> None:
    made, config = provider
    async with real_engine() as engine, attacked(tmp_path, engine, oidc=config) as target:
        target = replace(
            target, token=made.token(), public_keys=(tmp_path / "jwks.json").read_bytes()
        )
        async with staged(target) as scene:
            outcome = await identity.forged_tokens.run(scene)

    assert outcome.verdict is Verdict.HELD, outcome
    assert outcome.measured["tried"] > 15


async def test_a_server_that_does_not_check_signatures_is_found(
    tmp_path: Path, provider: tuple[IdentityProvider, OidcConfig], monkeypatch: Patch
) -> None:
    def unverified(self: TokenVerifier, token: str) -> TokenHolder:
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=="))
        return TokenHolder(TenantId(claims["tenant"]), KeyRole.INFERENCE, "x")

    monkeypatch.setattr(TokenVerifier, "holder", unverified)
    outcome = await outcome_of(identity.forged_tokens, tmp_path, FakeBackend(), oidc=provider[1])

    assert outcome.verdict is Verdict.BREACH
