from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvcluster.cli.main import app


def generate(*arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, ["generate", *arguments], input=stdin)


@pytest.mark.parametrize("arguments", [(), ("hello", "--file", "x.txt")])
def test_exactly_one_prompt_is_wanted(arguments: tuple[str, ...]) -> None:
    result = generate(*arguments)

    assert result.exit_code == 2
    assert "prompt: want one of PROMPT (- is stdin), --file, --prompt-ids" in result.stderr


def test_a_prompt_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = generate("--file", str(tmp_path / "no.txt"))

    assert result.exit_code == 2
    assert "no.txt cannot be read: No such file" in result.stderr


def test_a_prompt_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9")

    result = generate("--file", str(file))

    assert result.exit_code == 2
    assert "want UTF-8, byte 3 of the prompt is not" in result.stderr


def test_stdin_that_is_not_utf8_is_refused() -> None:
    result = generate("-", stdin=b"\xff")

    assert result.exit_code == 2
    assert "want UTF-8, byte 0 of the prompt is not" in result.stderr


@pytest.mark.parametrize("content", ['{"ids": [1]}', "[1, 2.5]", "[1,"])
def test_prompt_ids_that_are_no_list_of_whole_numbers_are_refused(
    content: str, tmp_path: Path
) -> None:
    file = tmp_path / "ids.json"
    file.write_text(content)

    result = generate("--prompt-ids", str(file))

    assert result.exit_code == 2
    assert "--prompt-ids: want a JSON list of whole numbers" in result.stderr


def test_a_server_that_is_not_there_exits_with_3() -> None:
    result = generate("--server", "127.0.0.1:9", "--timeout", "5", "hello")

    assert result.exit_code == 3
    assert result.stderr.startswith("kvcluster: ")
    assert result.stderr.count("\n") == 1
