import json

import pytest
import typer

from kvcluster.cli.exits import ExitCode, exit_code, exiting, print_json
from kvcluster.errors import (
    ClusterOverloaded,
    ConfigError,
    DeadlineExceeded,
    InvalidField,
    KvClusterError,
    ModelNotFound,
    RankLost,
    ServerUnavailable,
)


def leaves(kind: type[KvClusterError]) -> list[type[KvClusterError]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in leaves(child)] if children else [kind]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidField("temperature", "want at least 0"), ExitCode.USAGE),
        (ConfigError("model: want a name"), ExitCode.USAGE),
        (ModelNotFound("no such model"), ExitCode.USAGE),
        (ServerUnavailable("no server"), ExitCode.UNAVAILABLE),
        (RankLost("rank 1 died"), ExitCode.UNAVAILABLE),
        (ClusterOverloaded("too much waits"), ExitCode.REFUSED),
        (DeadlineExceeded("too late"), ExitCode.ENDED_EARLY),
        (KvClusterError("a bug"), ExitCode.BUG),
    ],
)
def test_the_exit_code_says_whose_turn_it_is(error: KvClusterError, code: ExitCode) -> None:
    with pytest.raises(typer.Exit) as ended, exiting(as_json=False):
        raise error

    assert ended.value.exit_code == code


@pytest.mark.parametrize("kind", leaves(KvClusterError))
def test_no_error_that_we_raise_on_purpose_looks_like_a_bug(kind: type[KvClusterError]) -> None:
    assert exit_code(kind.__new__(kind)) is not ExitCode.BUG


def test_an_error_is_one_line_on_stderr_with_the_time_to_retry(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit), exiting(as_json=False):
        raise ClusterOverloaded("256 requests wait: send fewer", retry_after_s=4.2)

    out, err = capsys.readouterr()
    assert err == "kvcluster: 256 requests wait: send fewer (try again in 4 s)\n"
    assert out == ""


def test_with_json_an_error_is_also_an_object_on_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit), exiting(as_json=True):
        raise InvalidField("top_p", "want 0 to 1")

    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "kind": "InvalidField",
            "reason": "INVALID_FIELD",
            "message": "top_p: want 0 to 1",
            "metadata": {"field": "top_p"},
            "retry_after_s": None,
        }
    }


def test_an_interrupt_exits_with_130() -> None:
    with pytest.raises(typer.Exit) as ended, exiting(as_json=False):
        raise KeyboardInterrupt

    assert ended.value.exit_code == 130


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exiting(as_json=False):
        raise ZeroDivisionError


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, 2]})

    assert capsys.readouterr().out == '{"a":[1,2]}\n'
