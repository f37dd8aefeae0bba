"""The whole suite against one server, as `kvcluster audit` runs it."""

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcluster.audit.attack import Attack, Verdict, held
from kvcluster.audit.scene import Scene, staged
from kvcluster.audit.suite import ATTACKS, chosen, run_audit
from kvcluster.cli.main import app
from kvcluster.errors import CredentialInvalid, InvalidField
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from tests.attacks.attacked import attacked, real_engine
from tests.unit.router.fake_backend import FakeBackend

QUICK = ("forged-keys", "spoofed-tenant", "foreign-names", "one-huge-request", "queue-position")


def test_every_attack_has_a_name_of_its_own_and_says_what_it_is() -> None:
    names = [attack.name for attack in ATTACKS]

    assert len(set(names)) == len(names) >= 24
    assert all(attack.tries and attack.breach for attack in ATTACKS)
    assert [one.name for one in chosen(["idle-stream", "no-credential"])] == [
        "no-credential",
        "idle-stream",
    ]
    with pytest.raises(InvalidField, match="nonsense"):
        chosen(["nonsense"])


async def test_an_audit_leaves_no_tenant_behind_and_touches_no_other(tmp_path: Path) -> None:
    async with real_engine() as engine, attacked(tmp_path, engine) as target:
        async with staged(target) as scene:
            await scene.operator.ask(pb.CreateTenantRequest(tenant_id="bystander"))
            parties = {scene.attacker.tenant, scene.victim.tenant}
            before = await scene.operator.ask(pb.GetTenantRequest(name="tenants/bystander"))
        seen = []
        report = await run_audit(target, chosen(QUICK), seen.append)
        async with staged(target) as scene:
            listed = await scene.operator.ask(pb.ListTenantsRequest())
            after = await scene.operator.ask(pb.GetTenantRequest(name="tenants/bystander"))
            own = {scene.attacker.name, scene.victim.name}
    assert isinstance(listed, pb.ListTenantsResponse)
    left = {tenant.name for tenant in listed.tenants} - own
    assert left == {"tenants/operators", "tenants/bystander"}
    assert before == after
    assert len(parties) == 2
    assert [finding.attack for finding in seen] == [one.name for one in chosen(QUICK)]
    assert report.is_held
    assert report.count(Verdict.HELD) == len(QUICK)


async def test_an_attack_that_ends_by_a_refusal_of_ordinary_calls_is_a_breach(
    tmp_path: Path,
) -> None:
    async def refused(scene: Scene) -> object:
        raise CredentialInvalid("the victim's good key")

    dying = Attack("dying", "t", "b", refused)  # type: ignore[arg-type]
    async with attacked(tmp_path, FakeBackend()) as target:
        report = await run_audit(target, [dying], lambda _: None)

    assert not report.is_held
    assert "CREDENTIAL_INVALID" in report.findings[0].outcome.found


async def test_an_attack_that_finds_nothing_is_held(tmp_path: Path) -> None:
    async def harmless(scene: Scene) -> object:
        return held("nothing", x=1.0)

    async with attacked(tmp_path, FakeBackend()) as target:
        report = await run_audit(target, [Attack("h", "t", "b", harmless)], lambda _: None)  # type: ignore[arg-type]

    assert report.is_held


async def invoked(*arguments: str) -> tuple[int, str, str]:
    result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    return result.exit_code, result.stdout, result.stderr


async def test_the_command_prints_a_report_and_its_code_tells_a_breach(tmp_path: Path) -> None:
    async with real_engine() as engine:
        for folder, insecure_local, code in (("good", False, 0), ("bad", True, 3)):
            (tmp_path / folder).mkdir()
            async with attacked(tmp_path / folder, engine, insecure_local=insecure_local) as target:
                key = tmp_path / folder / "key"
                key.write_text(target.operator)
                command = ["audit", "--server", target.address, "--api-key-file", str(key)]
                command += ["--admin-server", target.admin_address]
                command += ["--attack", "no-credential", "--attack", "forged-keys"]
                as_json = await invoked(*command, "--json")
                as_text = await invoked(*command)
            report = json.loads(as_json[1])
            verdicts = [finding["outcome"]["verdict"] for finding in report["findings"]]
            assert (as_json[0], as_text[0], report["is_held"]) == (code, code, not insecure_local)
            assert verdicts == ["breach" if insecure_local else "held"] * 2
            assert ("BREACH  no-credential" in as_text[1]) == insecure_local
            assert "2 attacks" in as_text[2]
            assert target.operator not in as_json[1] + as_text[1] + as_text[2]


async def test_the_command_lists_its_attacks_and_wants_an_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KVCLUSTER_API_KEY", raising=False)
    code, listing, _ = await invoked("audit", "--list")
    refused, _, stderr = await invoked("audit")
    unknown, _, _ = await invoked("audit", "--attack", "x")

    assert code == 0
    assert all(attack.name in listing and attack.tries in listing for attack in ATTACKS)
    assert (refused, unknown) == (2, 2)
    assert "operator" in stderr


async def test_without_a_server_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCLUSTER_API_KEY", "kvc_x")
    code, _, stderr = await invoked(
        "audit", "--server", "127.0.0.1:1", "--admin-server", "127.0.0.1:1"
    )

    assert code == 3
    assert "kvcluster:" in stderr
