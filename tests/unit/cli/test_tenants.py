"""`kvcluster tenants`: every verb against a router's real admin port."""

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcluster.cli.main import app
from kvcluster.cli.tenants import tenants
from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.config_access import TlsConfig
from kvcluster.config_sources import API_KEY_VARIABLE, load
from kvcluster.router.front_door import FrontDoor
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from tests.certificates import Authority
from tests.unit.cli.conftest import Ended, run
from tests.unit.router.administering import Administered, administered, bootstrap
from tests.unit.router.fake_backend import FakeBackend


async def invoked(*arguments: str) -> Ended:
    """A command in this process, and in a thread: a server answers it meanwhile."""
    result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    return Ended(code=result.exit_code, stdout=result.stdout, stderr=result.stderr)


@dataclass
class Shell:
    """Runs verbs with an operator's key in a file."""

    admin: Administered
    key_file: Path
    database: Path

    async def run(self, verb: str, *arguments: str, key_file: Path | None = None) -> Ended:
        key = str(key_file or self.key_file)
        flags = ("--server", self.admin.door.admin_address, "--api-key-file", key)
        return await invoked("tenants", verb, *arguments, *flags)

    async def json(self, verb: str, *arguments: str) -> Any:
        ended = await self.run(verb, *arguments, "--json")
        assert (ended.code, ended.stderr) == (0, "")
        return json.loads(ended.stdout)


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    database, key_file = tmp_path / "tenants.sqlite", tmp_path / "key"
    async with administered(database, FakeBackend()) as admin:
        key_file.write_text(f"{admin.secret}\n")
        yield Shell(admin, key_file, database)


def test_every_rpc_has_a_verb_and_every_verb_but_two_an_rpc() -> None:
    verbs = {
        (command.name or command.callback.__name__).replace("_", "-")
        for command in tenants.registered_commands
        if command.callback is not None
    }
    rpcs = {
        re.sub(r"(?<!^)(?=[A-Z])", "-", method.name).lower()
        for method in pb.DESCRIPTOR.services_by_name["TenantService"].methods
    }

    assert verbs - rpcs == {"bootstrap", "adopt-root-key"}
    assert rpcs <= verbs


async def test_a_tenant_is_administered_from_the_shell(shell: Shell) -> None:
    made = await shell.json(
        "create-tenant",
        "red",
        *("--display-name", "Red", "--label", "team=search", "--limit", "weight=3"),
        *("--limit", "input_tokens_per_minute=2M", "--partition", "gpu.limit_bytes=40GiB"),
        *("--default-policy", "int4", "--allow-policy", "int4", "--allow-policy", "exact"),
    )
    assert made["limits"]["weight"] == "3"
    assert made["limits"]["input_tokens_per_minute"] == "2000000"
    assert made["limits"]["allowed_policies"] == ["int4", "exact"]
    assert made["partitions"]["gpu"]["limit_bytes"] == str(40 * 2**30)

    updated = await shell.json(
        "update-tenant", "red", "--limit", "weight=5", "--clear", "display_name"
    )
    assert (updated["limits"]["weight"], updated["display_name"]) == ("5", "")
    assert updated["labels"] == {"team": "search"}

    for verb, state in (
        ("suspend-tenant", "SUSPENDED"),
        ("resume-tenant", "ACTIVE"),
        ("drain-tenant", "DRAINING"),
        ("delete-tenant", "DELETED"),
        ("undelete-tenant", "ACTIVE"),
    ):
        assert (await shell.json(verb, "tenants/red"))["state"] == f"STATE_{state}"
    assert (await shell.json("rotate-tenant-key", "red", "--crypto-erase"))["key_version"] == 3
    assert (await shell.json("get-tenant-usage", "red"))["running_generations"] == "0"
    watched = await shell.run(
        "watch-tenant-usage", "red", "--interval", "0.1", "--count", "2", "--json"
    )
    assert [json.loads(line)["name"] for line in watched.stdout.splitlines()] == [
        "tenants/red/usage"
    ] * 2
    listed = await shell.json("list-tenants", "--filter", "labels.team=search")
    assert [tenant["name"] for tenant in listed["tenants"]] == ["tenants/red"]


async def test_keys_are_made_listed_and_revoked_and_the_audit_log_tells(shell: Shell) -> None:
    await shell.json("create-tenant", "red")
    made = await shell.run("create-api-key", "red", "--api-key-id", "k1", "--expires-in", "30")
    secret = re.search(r"^secret: (kvc_\S+)$", made.stdout, re.MULTILINE)
    listed = await shell.run("list-api-keys", "red")
    revoked = await shell.json("revoke-api-key", "red", "k1")
    events = await shell.json("list-audit-events", "red", "--page-size", "2")
    every = await shell.json("list-audit-events")
    verified = await shell.json("verify-audit-log")
    offline = await invoked(
        "tenants", "verify-audit-log", "--database", str(shell.database), "--json"
    )

    assert secret is not None
    assert "cannot be shown again" in made.stderr
    assert secret[1] not in listed.stdout + listed.stderr
    assert "tenants/red/apiKeys/k1" in listed.stdout
    assert "revoke_time" in revoked
    assert [event["method"] for event in events["audit_events"]] == ["CreateTenant", "CreateApiKey"]
    assert events["next_page_token"]
    assert [event["method"] for event in every["audit_events"]][-1] == "RevokeApiKey"
    assert verified["intact"] is True
    assert json.loads(offline.stdout) == verified


async def test_all_pages_are_one_answer_unless_one_is_asked_for(shell: Shell) -> None:
    for number in range(53):
        await shell.admin.create(f"t{number:02}")

    everything = await shell.json("list-tenants")

    assert len(everything["tenants"]) == 54
    assert everything["next_page_token"] == ""


async def test_a_tampered_log_is_told_and_exits_with_3(shell: Shell) -> None:
    await shell.admin.create("red")
    with sqlite3.connect(shell.database) as intruder:
        intruder.execute("UPDATE audit_events SET principal = 'x' WHERE number = 2")

    asked = await shell.run("verify-audit-log")

    assert asked.code == 3
    assert "fault: event 2 was changed after it was written" in asked.stdout


async def test_the_first_key_is_made_in_the_file_and_works(tmp_path: Path) -> None:
    database = tmp_path / "new.sqlite"
    made = await run("tenants", "bootstrap", "--database", str(database), "--json")
    secret = json.loads(made.stdout)["secret"]

    async with administered(database, FakeBackend(), operator=secret) as admin:
        assert (await admin.create("red")).name == "tenants/red"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("get-tenant", "none"), 2, "there is no tenant 'none'"),
        (("get-tenant", "no/such"), 2, "TENANT: want the id of a tenant"),
        (("create-tenant", "Red"), 2, "tenant_id: want 1 to 63 of a-z 0-9 -"),
        (("create-tenant", "red", "--limit", "weight"), 2, "--limit: want NAME=VALUE"),
        (("create-tenant", "red", "--limit", "age=3"), 2, "there is no 'age'"),
        (("create-tenant", "red", "--limit", "weight=-1"), 2, "want a whole number"),
        (("create-tenant", "red", "--limit", "weight=99999999T"), 2, "want a whole number"),
        (("create-tenant", "red", "--partition", "ssd.limit_bytes=1"), 2, "want gpu, host or disk"),
        (("create-api-key", "operators", "--role", "king"), 2, "--role: want one of inference"),
        (("create-api-key", "operators", "--expires-in", "0"), 2, "--expires-in: want more than 0"),
        (("list-tenants", "--filter", "age<3"), 2, "filter: want FIELD=VALUE"),
        (("update-tenant", "operators", "--display-name", "x"), 2, "always there as it is"),
    ],
)
async def test_what_is_wrong_is_one_line_and_a_code(
    arguments: tuple[str, ...], code: int, message: str, shell: Shell
) -> None:
    ended = await shell.run(*arguments)

    assert (ended.code, ended.stdout) == (code, "")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


async def test_a_wrong_key_and_a_missing_server_have_codes(shell: Shell, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("kvc_nonsense")

    refused = await shell.run("list-tenants", "--json", key_file=wrong)
    nobody = await invoked("tenants", "list-tenants", "--server", "127.0.0.1:9")

    assert refused.code == 2
    assert json.loads(refused.stdout)["error"]["reason"] == "CREDENTIAL_INVALID"
    assert nobody.code == 3


@pytest.mark.parametrize("content", ["", " \n", "two words", "é"])
def test_a_file_without_a_key_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(content)

    result = CliRunner().invoke(app, ["tenants", "list-tenants", "--api-key-file", str(file)])

    assert result.exit_code == 2
    assert "has no API key" in result.stderr


def test_the_variable_of_the_key_is_no_setting_of_a_server() -> None:
    assert load(file=None, environ={API_KEY_VARIABLE: "kvc_x"}, overrides={}).origins == {}


async def test_generate_takes_its_key_from_the_variable(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shell.admin.create("red")
    address = shell.admin.door.address
    ask = ("generate", "hello", "--server", address, "--max-output-tokens", "5")

    refused = await run(*ask)
    monkeypatch.setenv(API_KEY_VARIABLE, await shell.admin.key("red"))
    answered = await run(*ask)

    assert refused.code == 2
    assert "want 'authorization: Bearer SECRET'" in refused.stderr
    assert (answered.code, answered.stdout) == (0, "hello")


async def test_flags_of_certificates_reach_a_server_behind_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own, alice = authority.issue("server"), authority.issue("alice")
    database = tmp_path / "tenants.sqlite"
    key_file = tmp_path / "key"
    key_file.write_text(bootstrap(database))
    door = FrontDoor(
        [FakeBackend()],
        RouterConfig(listen="127.0.0.1:0"),
        TenancyConfig(database=str(database), admin_listen="127.0.0.1:0"),
        tls=TlsConfig(
            certificate=str(own.certificate),
            key=str(own.key),
            client_ca=str(authority.file),
            admin_client_ca=str(authority.file),
        ),
    )
    await door.start()
    try:
        flags = ["--api-key-file", str(key_file), "--tls-ca", str(authority.file)]
        flags += ["--tls-cert", str(alice.certificate)]
        at = ["tenants", "list-tenants", "--server", door.admin_address, "--json"]
        good = await run(*at, *flags, "--tls-key", str(alice.key))
        unfit = await run(*at, *flags, "--tls-key", str(own.key))
        asked = await run(
            *("doctor", "--json", "--server", door.address), *flags, "--tls-key", str(alice.key)
        )
    finally:
        await door.stop(grace_s=0)

    assert (good.code, json.loads(good.stdout)["tenants"][0]["name"]) == (0, "tenants/operators")
    assert (unfit.code, "not that of" in unfit.stderr) == (2, True)
    # The key is an operator's, so models are not told: but the connection stands.
    assert "the credential has the role operator" in asked.stdout


async def test_a_root_key_is_adopted_in_the_file_and_then_asked_for(tmp_path: Path) -> None:
    root_key, at = tmp_path / "root.key", ("--database", str(tmp_path / "tenants.sqlite"))
    root_key.write_text("ab" * 32)
    key = ("--root-key", str(root_key))
    made = await invoked("tenants", "bootstrap", *at)
    adopted = await invoked("tenants", "adopt-root-key", *at, *key, "--json")
    without = await invoked("tenants", "verify-audit-log", *at)
    checked = await invoked("tenants", "verify-audit-log", *at, *key, "--json")
    second = await invoked("tenants", "bootstrap", *at, *key)

    assert [ended.code for ended in (made, adopted, without, checked, second)] == [0, 0, 2, 0, 0]
    assert json.loads(adopted.stdout) == json.loads(checked.stdout)
    assert json.loads(checked.stdout)["events"] == "2"
    assert "was written with one" in without.stderr
