"""`generate` and `doctor` against a router on a real port."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcluster.engine.api import FinishReason
from tests.unit.cli.conftest import WatchedBackend, ended, run, started


async def test_the_answer_is_written_to_stdout_and_the_summary_to_stderr(server: str) -> None:
    result = await run("generate", "--server", server, "--max-output-tokens", "5", "hello")

    assert (result.code, result.stdout) == (0, "hello")
    assert "length: 5 + 5 tokens, first token after" in result.stderr
    assert "of cache (exact)" in result.stderr


async def test_json_is_one_object_with_text_tokens_usage_and_times(server: str) -> None:
    result = await run(
        "generate", "--server", server, "--max-output-tokens", "3", "--json", "hello"
    )

    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    assert (report["text"], report["token_ids"]) == ("hel", [104, 101, 108])
    assert (report["finish_reason"], report["policy"]) == ("length", "exact")
    assert report["usage"]["input_tokens"] == 5
    assert report["timings"]["time_to_first_token_s"] > 0


async def test_a_prompt_comes_from_stdin(server: str) -> None:
    result = await run(
        "generate", "--server", server, "--max-output-tokens", "4", "-", stdin="from stdin"
    )

    assert result.stdout == "from"


async def test_a_prompt_comes_from_a_file(server: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file")

    result = await run(
        "generate", "--server", server, "--max-output-tokens", "4", "--file", str(file)
    )

    assert result.stdout == "from"


async def test_a_prompt_comes_as_token_ids(server: str, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[104, 105]")

    result = await run(
        "generate", "--server", server, "--max-output-tokens", "2", "--prompt-ids", str(file)
    )

    assert result.stdout == "hi"


async def test_every_sampling_flag_reaches_the_engine(server: str, backend: WatchedBackend) -> None:
    flags = "--temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --seed 42 --stop a --stop b"

    await run("generate", "--server", server, *flags.split(), "--ignore-eos", "hello")

    (generation,) = backend.generations.values()
    sampling = generation.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.seed, sampling.stop) == (0.1, 42, ("a", "b"))
    assert sampling.ignore_eos


async def test_a_request_that_is_wrong_exits_with_2_and_says_why(server: str) -> None:
    result = await run("generate", "--server", server, "--temperature", "-1", "hello")

    assert result.code == 2
    assert "sampling.temperature: want 0 or more, got -1.0" in result.stderr
    assert result.stdout == ""


async def test_an_unknown_model_exits_with_2(server: str) -> None:
    result = await run("generate", "--server", server, "--model", "no-such", "hello")

    assert result.code == 2
    assert "no-such" in result.stderr


async def test_a_deadline_that_passes_exits_with_5(server: str, backend: WatchedBackend) -> None:
    backend.gate.clear()

    result = await run("generate", "--server", server, "--timeout", "1.5", "hello")

    assert result.code == 5


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """In the background a shell has SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
async def test_ctrl_c_cancels_the_generation_and_exits_with_130(
    server: str, backend: WatchedBackend
) -> None:
    backend.gate.clear()
    command = await started("generate", "--server", server, "hello")
    await backend.opened.wait()

    command.send_signal(signal.SIGINT)
    result = await ended(command)

    assert (result.code, result.stderr) == (130, "kvcluster: interrupted\n")
    (generation,) = backend.generations.values()
    async with generation.changed:
        await generation.changed.wait_for(lambda: generation.finished is not None)
    assert generation.finished is not None
    assert generation.finished.reason is FinishReason.CANCELLED


async def test_doctor_lists_what_a_ready_server_serves(server: str) -> None:
    result = await run("doctor", "--server", server, "--json")

    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert found[f"server {server}"]["found"] == "ready"
    assert "8,000,000 tokens" in found["serves echo"]["found"]
    assert found["policies of echo"]["found"] == (
        "own, exact, int4, full, window:size=4096, all; default: exact"
    )


async def test_a_policy_reaches_the_engine_and_the_summary_names_its_bound(
    server: str, backend: WatchedBackend
) -> None:
    result = await run("generate", "--server", server, "--policy", "auto: ppl<=1%", "hello")

    (generation,) = backend.generations.values()
    assert generation.request.policy == "auto: ppl<=1%"
    assert "of cache (int4 for auto: ppl<=1%)" in result.stderr


async def test_a_mistake_in_a_policy_exits_with_2_and_points_at_it(server: str) -> None:
    result = await run("generate", "--server", server, "--policy", "int4 + windw", "hello")

    assert result.code == 2
    assert "policy: at character 8: no method is called 'windw' (did you mean window?)" in (
        result.stderr
    )


async def test_doctor_fails_for_a_server_that_is_not_ready(
    server: str, backend: WatchedBackend
) -> None:
    backend.is_ready = False

    result = await run("doctor", "--server", server)

    assert result.code == 3
    assert "not ready" in result.stdout


@pytest.mark.parametrize("command", ["serve", "generate", "doctor", "bench"])
async def test_no_command_leaves_a_traceback_for_wrong_usage(command: str) -> None:
    result = await run(command, "--no-such-flag")

    assert result.code == 2
    assert "Traceback" not in result.stderr
