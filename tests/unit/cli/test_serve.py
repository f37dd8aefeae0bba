from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvcluster.cli.main import app


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments])


def test_serving_without_authentication_has_to_be_asked_for() -> None:
    result = serve()

    assert result.exit_code == 2
    assert "add --insecure-local" in result.stderr


def test_serving_without_authentication_beyond_loopback_is_refused() -> None:
    result = serve("--insecure-local", "--listen", "0.0.0.0:50051")

    assert result.exit_code == 2
    assert "router.listen: want a loopback address" in result.stderr
    assert "(from flag)" in result.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cache.block_size=48", "cache.block_size: want a power of two, got 48 (from flag)"),
        ("cache.block_siz=64", "the nearest is cache.block_size"),
        ("cache.block_size", "--set: want KEY=VALUE, got 'cache.block_size'"),
    ],
)
def test_a_wrong_setting_is_refused_with_one_line(setting: str, message: str) -> None:
    result = serve("--insecure-local", "--set", setting)

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_named_flag_wins_over_set(tmp_path: Path) -> None:
    result = serve("--insecure-local", "--set", "dtype=auto", "--dtype", "float8")

    assert "dtype: want one of auto, float32, bfloat16, float16, got 'float8'" in result.stderr


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = serve("--config", str(tmp_path / "no.toml"))

    assert result.exit_code == 2
    assert "no.toml: cannot be read" in result.stderr


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCLUSTER_RING__NUM_RANKS", "0")

    assert "want at least 1, got 0 (from KVCLUSTER_RING__NUM_RANKS)" in serve().stderr
