import json
import socket
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner, Result

from kvcluster.cli.main import app


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def checks(result: Result) -> dict[str, dict[str, object]]:
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def listen_on(monkeypatch: pytest.MonkeyPatch, port: int) -> str:
    listen = f"127.0.0.1:{port}"
    monkeypatch.setenv("KVCLUSTER_ROUTER__LISTEN", listen)
    return f"listen {listen}"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_versions_and_models_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    listen_on(monkeypatch, 0)

    found = checks(doctor("--json"))

    assert {"python", "torch", "ray", "grpcio", "gpu", "model smollm2-135m"} <= found.keys()
    assert found["python"]["is_ok"]


def test_a_taken_port_fails_with_its_fix(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    name = listen_on(monkeypatch, taken_port)

    result = doctor("--json")

    assert result.exit_code == 3
    assert not checks(result)[name]["is_ok"]
    assert "--listen" in str(checks(result)[name]["fix"])


def test_a_wrong_variable_fails_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCLUSTER_CACHE__BLOCK_SIZ", "64")

    result = doctor()

    assert result.exit_code == 3
    assert "FAILS  settings" in result.stdout
    assert "KVCLUSTER_CACHE__BLOCK_SIZ" in result.stdout


def test_a_server_that_does_not_answer_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{unused.getsockname()[1]}"

        result = doctor("--json", "--server", server)

    assert result.exit_code == 3
    assert "kvcluster serve" in str(checks(result)[f"server {server}"]["fix"])
