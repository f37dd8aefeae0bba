"""Attacks on the names of cached blocks: on our engine, and on one whose names leave something
out."""

from pathlib import Path

import pytest

from kvcluster.audit import collisions
from kvcluster.audit.attack import Verdict
from kvcluster.cache.block_keys import BlockKeys
from kvcluster.cache.prefix_cache import PrefixCache
from tests.attacks.attacked import PROMPT_TOKENS, outcome_of
from tests.attacks.broken_backends import CachesByContents
from tests.unit.router.fake_backend import FakeBackend


async def test_our_server_holds(tmp_path: Path) -> None:
    outcome = await outcome_of(collisions.confused_prompts, tmp_path)

    assert outcome.verdict is Verdict.HELD, outcome
    assert outcome.measured["control_tokens"] > 0


async def test_our_server_holds_though_all_names_collide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockKeys, "_digest", lambda _self, _content: b"one name")

    outcome = await outcome_of(collisions.confused_prompts, tmp_path)

    assert outcome.verdict is Verdict.HELD, outcome


async def test_names_that_leave_out_the_order_are_found(tmp_path: Path) -> None:
    outcome = await outcome_of(collisions.confused_prompts, tmp_path, CachesByContents())

    assert outcome.verdict is Verdict.BREACH, outcome


async def test_names_that_collide_and_are_believed_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake ring would refuse what comes of it, so it is the engine's word that is wrong."""
    monkeypatch.setattr(BlockKeys, "_digest", lambda self, _content: bytes([len(self.keys)]))
    monkeypatch.setattr(
        PrefixCache,
        "match",
        lambda self, keys, _tokens, start=0, _after=None: [
            self._blocks[key] for key in keys[start:] if key in self._blocks
        ],
    )
    outcome = await outcome_of(collisions.confused_prompts, tmp_path)

    assert outcome.verdict is Verdict.BREACH, outcome
    assert PROMPT_TOKENS >= 16


async def test_without_a_cache_nothing_is_claimed(tmp_path: Path) -> None:
    outcome = await outcome_of(collisions.confused_prompts, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.INCONCLUSIVE, outcome
