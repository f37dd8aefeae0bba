"""Attacks on what a caller may reach: held by our server, seen where a server is broken."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvcluster.audit import reach
from kvcluster.audit.attack import Attack, Verdict
from kvcluster.errors import ResourceNotFound
from kvcluster.router import calls, service, tenants
from kvcluster.router.calls import Call
from tests.attacks.attacked import outcome_of
from tests.attacks.broken_backends import ForgetsTenants, SharesRequestIds
from tests.unit.router.fake_backend import FakeBackend

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("attack", reach.ATTACKS, ids=lambda attack: attack.name)
async def test_our_server_holds(attack: Attack, tmp_path: Path) -> None:
    outcome = await outcome_of(attack, tmp_path)

    assert outcome.verdict is Verdict.HELD, outcome


async def test_names_are_tried_in_every_field_that_takes_one(tmp_path: Path) -> None:
    outcome = await outcome_of(reach.foreign_names, tmp_path, FakeBackend())

    # Of each service at least: 4 of InferenceService, 16 of TenantService.
    assert outcome.measured["fields"] >= 20


async def test_a_server_that_lets_administrators_see_every_tenant_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(tenants, "_check_own", lambda call, tenant, roles: None)

    outcome = await outcome_of(reach.foreign_names, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
    assert "GetTenant name" in outcome.found
    assert "RotateTenantKey" in outcome.found


async def test_a_server_that_tells_which_tenants_exist_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    check = tenants._check_own

    def telling(call: Call, tenant: str, roles: object) -> None:
        if tenant.endswith("no-such-tenant"):
            raise ResourceNotFound("there is no such tenant")
        check(call, tenant, roles)  # type: ignore[arg-type]

    monkeypatch.setattr(tenants, "_check_own", telling)

    outcome = await outcome_of(reach.foreign_names, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
    assert "exists" in outcome.found


async def test_a_server_that_lists_for_any_parent_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(service.names, "check_parent", lambda name, tenant: None)

    outcome = await outcome_of(reach.foreign_names, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
    assert "ListGenerations parent" in outcome.found


@pytest.mark.parametrize(
    ("attack", "backend"),
    [
        (reach.foreign_generations, ForgetsTenants),
        (reach.shared_request_id, SharesRequestIds),
    ],
    ids=["generations", "request ids"],
)
async def test_an_engine_that_forgets_whose_an_id_is_is_found(
    attack: Attack, backend: Callable[[], FakeBackend], tmp_path: Path
) -> None:
    outcome = await outcome_of(attack, tmp_path, backend())

    assert outcome.verdict is Verdict.BREACH


async def test_a_server_that_raises_on_malformed_messages_is_found(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(calls, "parser_of", lambda kind, max_bytes: kind.FromString)
    monkeypatch.setattr(calls, "unwrap", lambda message: message)

    outcome = await outcome_of(reach.malformed_messages, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
