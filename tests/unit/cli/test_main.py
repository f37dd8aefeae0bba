import subprocess
import sys
from importlib import metadata

import pytest
from typer.testing import CliRunner

from kvcluster.cli.main import app


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])

    assert result.stdout == f"kvcluster {metadata.version('kvcluster')}\n"


@pytest.mark.parametrize("command", ["serve", "generate", "doctor", "calibrate", "bench"])
def test_every_command_has_json_and_explains_its_exit_codes(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"]).stdout

    assert "--json" in text
    assert "Exit codes: 0 done;" in text


def test_an_unknown_command_exits_with_2() -> None:
    assert CliRunner().invoke(app, ["sevre"]).exit_code == 2


def test_it_runs_as_a_module_where_no_script_is_installed() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "kvcluster", "--version"], capture_output=True, text=True, check=True
    )

    assert run.stdout == f"kvcluster {metadata.version('kvcluster')}\n"
