"""Attacks on what is not said: paired with what shows within a tenant, and seen where it leaks."""

import time
from pathlib import Path

import pytest

from kvcluster.audit import channels
from kvcluster.audit.attack import Attack, Verdict
from kvcluster.tenancy import directory
from tests.attacks.attacked import outcome_of
from tests.attacks.broken_backends import Caches, CountsEverybody, TellsByTime
from tests.unit.router.fake_backend import FakeBackend


async def test_a_cache_of_each_tenants_own_holds_and_shows_to_itself(tmp_path: Path) -> None:
    outcome = await outcome_of(channels.prefix_timing, tmp_path, Caches())

    assert outcome.verdict is Verdict.HELD, outcome
    assert abs(outcome.measured["control_t"]) > 4.5


async def test_without_a_cache_nothing_is_claimed(tmp_path: Path) -> None:
    outcome = await outcome_of(channels.prefix_timing, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.INCONCLUSIVE, outcome


@pytest.mark.parametrize("says_cached", [True, False], ids=["said", "by its time alone"])
async def test_a_cache_that_tenants_share_is_found(says_cached: bool, tmp_path: Path) -> None:
    backend = Caches(is_shared=True, says_cached=says_cached)

    outcome = await outcome_of(channels.prefix_timing, tmp_path, backend)

    assert outcome.verdict is Verdict.BREACH, outcome
    assert ("reported" in outcome.found) == says_cached


async def test_refusals_take_as_long_for_what_another_tenant_has(tmp_path: Path) -> None:
    outcome = await outcome_of(channels.existence_timing, tmp_path)

    assert outcome.verdict is Verdict.HELD, outcome


async def test_refusals_that_tell_by_their_time_are_found(tmp_path: Path) -> None:
    outcome = await outcome_of(channels.existence_timing, tmp_path, TellsByTime())

    assert outcome.verdict is Verdict.BREACH, outcome
    assert outcome.measured["median_us"] > 500


async def test_refusals_of_keys_that_tell_by_their_time_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = directory.is_secret

    def slow_where_there_is_one(text: str, digest: str | None) -> bool:
        """As a slow password hash is that is left out where there is nothing to compare."""
        end = time.perf_counter() + (0.005 if digest else 0.0)
        while time.perf_counter() < end:
            pass
        return compare(text, digest)

    monkeypatch.setattr(directory, "is_secret", slow_where_there_is_one)

    outcome = await outcome_of(channels.credential_timing, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH, outcome


@pytest.mark.parametrize(("is_shared", "verdict"), [(False, Verdict.HELD), (True, Verdict.BREACH)])
async def test_evictions_by_another_tenant_are_found(
    is_shared: bool, verdict: Verdict, tmp_path: Path
) -> None:
    backend = Caches(is_shared=is_shared, capacity=20)

    outcome = await outcome_of(channels.eviction_probing, tmp_path, backend)

    assert outcome.verdict is verdict, outcome
    assert outcome.measured["hits_resting"] > 0, outcome


async def test_a_place_in_the_queue_that_counts_everybody_is_found(tmp_path: Path) -> None:
    outcome = await outcome_of(channels.queue_position, tmp_path, CountsEverybody())

    assert outcome.verdict is Verdict.BREACH, outcome


@pytest.mark.parametrize(
    "attack", [channels.queue_position, channels.credential_timing], ids=lambda attack: attack.name
)
async def test_our_server_holds(attack: Attack, tmp_path: Path) -> None:
    outcome = await outcome_of(attack, tmp_path)

    assert outcome.verdict is Verdict.HELD, outcome
