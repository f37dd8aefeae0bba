"""`kvcluster contexts` and `kvcluster generate --context`, as commands against a real port."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcluster.cli.main import app
from kvcluster.config import CacheConfig, EngineConfig
from tests.fake_engine import CharacterTokenizer, FakeCluster, model_spec
from tests.unit.cli.conftest import Ended, run
from tests.unit.engine.serving import Served, serve
from tests.unit.router.serving import serving

TOKENS = [position * position % 120 + 1 for position in range(42)]


@pytest.fixture
async def port() -> AsyncIterator[tuple[str, Served]]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=(), max_context_tokens=200),
        cache=CacheConfig(block_size=4),
        config=EngineConfig(prefill_chunk_tokens=8, shard_min_tokens=16),
        tokenizer=CharacterTokenizer(),
    )
    async for served in serve(fake):
        async with serving(served.service) as server:
            yield server.address, served


def answer(ended: Ended) -> dict[str, object]:
    assert ended.code == 0, ended.stderr
    found: dict[str, object] = json.loads(ended.stdout)
    return found


async def test_a_context_is_uploaded_used_continued_and_deleted(
    port: tuple[str, Served], tmp_path: Path
) -> None:
    address, served = port
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(TOKENS))
    server = ("--server", address, "--json")

    uploaded = answer(
        await run("contexts", "upload", "book", "--prompt-ids", str(ids), "--pinned", *server)
    )
    generated = answer(
        await run("generate", "why?", "--context", "book", "--max-output-tokens", "4", *server)
    )
    appended = answer(await run("contexts", "append", "book", "more", *server))
    deleted = answer(await run("contexts", "delete", "book", *server))
    gone = await run("contexts", "get", "book", "--server", address)

    assert (uploaded["token_count"], uploaded["pinned"]) == (42, True)
    assert generated["token_ids"] == served.expected([*TOKENS, *map(ord, "why?")])
    assert generated["usage"]["cached_input_tokens"] == 40  # type: ignore[index]
    assert appended["token_count"] == 46
    assert deleted == {"deleted": "book"}
    assert gone.code != 0
    assert "no such context" in gone.stderr


async def test_contexts_are_forked_changed_and_listed(port: tuple[str, Served]) -> None:
    address, _ = port
    server = ("--server", address)
    await run("contexts", "upload", "book", "-", *server, stdin="a long book")
    forked = answer(
        await run("contexts", "fork", "book", "start", "--prefix-tokens", "6", *server, "--json")
    )
    updated = answer(
        await run(
            "contexts",
            "update",
            "start",
            "--display-name",
            "The start",
            "--ttl",
            "60",
            "--etag",
            str(forked["etag"]),
            *server,
            "--json",
        )
    )
    listed = await run("contexts", "list", "--filter", 'display_name="The start"', *server)

    assert (forked["token_count"], updated["display_name"]) == (6, "The start")
    assert updated["expire_time_s"] is not None
    [line] = listed.stdout.splitlines()
    assert line.startswith("tenants/default/contexts/start  ACTIVE  6 tokens")
    assert line.endswith("The start")


@pytest.mark.parametrize("verb", ["upload", "append", "get", "list", "update", "fork", "delete"])
def test_every_verb_has_json_and_help(verb: str) -> None:
    text = CliRunner().invoke(app, ["contexts", verb, "--help"]).stdout

    assert "--json" in text
    assert "--tenant" in text
