"""Attacks on what all share: held by our server, seen where a server is broken."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from grpc import aio

from kvcluster.audit import exhaustion
from kvcluster.audit.attack import Attack, Verdict
from kvcluster.audit.scene import OPEN_STREAMS
from kvcluster.errors import CredentialInvalid
from kvcluster.router import server
from kvcluster.router.auth import Caller, Credentials
from kvcluster.router.open_calls import OpenCall, OpenCalls
from kvcluster.types import TenantId
from tests.attacks.attacked import outcome_of
from tests.attacks.broken_backends import TakesAnyLength
from tests.unit.router.fake_backend import FakeBackend

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("attack", exhaustion.ATTACKS, ids=lambda attack: attack.name)
async def test_our_server_holds(attack: Attack, tmp_path: Path) -> None:
    outcome = await outcome_of(attack, tmp_path)

    assert outcome.verdict is Verdict.HELD, outcome


@pytest.mark.parametrize(
    "attack",
    [
        exhaustion.slow_upload,
        exhaustion.idle_stream,
        exhaustion.window_stall,
        exhaustion.message_flood,
    ],
    ids=lambda attack: attack.name,
)
async def test_a_server_with_one_limit_for_all_is_found(
    attack: Attack, tmp_path: Path, monkeypatch: Patch
) -> None:
    """grpc's own `maximum_concurrent_rpcs` knows no tenants: a few streams lock everybody out."""
    limited = partial(aio.server, maximum_concurrent_rpcs=OPEN_STREAMS)
    monkeypatch.setattr(server.aio, "server", limited)

    outcome = await outcome_of(attack, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
    assert "victim" in outcome.found


async def test_a_server_that_counts_no_streams_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    @contextmanager
    def uncounted(self: OpenCalls, call: OpenCall, limit: int) -> Iterator[None]:
        yield

    monkeypatch.setattr(OpenCalls, "holding", uncounted)

    outcome = await outcome_of(exhaustion.many_small_requests, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH


async def test_an_engine_that_looks_at_lengths_late_is_found(tmp_path: Path) -> None:
    outcome = await outcome_of(exhaustion.one_huge_request, tmp_path, TakesAnyLength())

    assert outcome.verdict is Verdict.BREACH


@pytest.mark.parametrize(
    ("attack", "option"),
    [
        (exhaustion.huge_metadata, ("grpc.max_metadata_size", "grpc.absolute_max_metadata_size")),
        (exhaustion.message_flood, ("grpc.compression_enabled_algorithms_bitset",)),
    ],
    ids=["metadata", "compression"],
)
async def test_a_server_without_a_limit_of_the_transport_is_found(
    attack: Attack, option: tuple[str, ...], tmp_path: Path, monkeypatch: Patch
) -> None:
    limits = server.server_options

    def without(config: object) -> list[tuple[str, int]]:
        unlimited = {"grpc.max_metadata_size": 1 << 22, "grpc.absolute_max_metadata_size": 1 << 22}
        kept = [(name, value) for name, value in limits(config) if name not in option]  # type: ignore[arg-type]
        return [*kept, *((name, unlimited[name]) for name in option if name in unlimited)]

    monkeypatch.setattr(server, "server_options", without)

    outcome = await outcome_of(attack, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH


async def test_a_server_that_lets_guesses_in_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    find = Credentials._caller

    def lax(self: Credentials, secret: str) -> Caller:
        try:
            return find(self, secret)
        except CredentialInvalid:
            return Caller(tenant=TenantId("default"))

    monkeypatch.setattr(Credentials, "_caller", lax)

    outcome = await outcome_of(exhaustion.call_flood, tmp_path, FakeBackend())

    assert outcome.verdict is Verdict.BREACH
