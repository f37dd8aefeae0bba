"""Operators publish prefixes through the admin port; they stay, whatever happens to engines."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest

from kvcluster.client import Client
from kvcluster.engine.api import Finished
from kvcluster.engine.context_api import ContextRequest, ContextState
from kvcluster.engine.service import EngineService
from kvcluster.errors import QuotaExceeded
from kvcluster.router import published
from kvcluster.router.convert import pack_ids
from kvcluster.router.published import PublishedPrefixes
from kvcluster.rpc.v1 import common_pb2
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.published import PublishedPrefix
from kvcluster.tenancy.store import TenantStore
from kvcluster.types import PUBLISHED
from tests.attacks.attacked import real_engine
from tests.unit.router.administering import ADMIN, Administered, administered, bearer
from tests.unit.router.serving import refusal_of

IDS = [position * position % 60 + 1 for position in range(40)]
SUFFIX = [7, 8, 9]


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Administered]:
    async with (
        real_engine() as engine,
        administered(tmp_path / "tenants.sqlite", engine) as found,
    ):
        yield found


def request(ids: list[int] = IDS, name: str = "system", **fields: str) -> pb.PublishPrefixRequest:
    return pb.PublishPrefixRequest(
        published_prefix_id=name,
        published_prefix=pb.PublishedPrefix(**fields),
        content=common_pb2.TokenInput(ids=common_pb2.TokenIds(ids=ids)),
    )


async def listed(admin: Administered) -> list[pb.PublishedPrefix]:
    found = await admin.stub.ListPublishedPrefixes(
        pb.ListPublishedPrefixesRequest(), metadata=admin.operator
    )
    return list(found.published_prefixes)


async def cached(admin: Administered, secret: str) -> int:
    async with Client(admin.door.address, api_key=secret) as client:
        asking = client.generate(prompt_ids=[*IDS, *SUFFIX], max_output_tokens=1)
        async with aclosing(asking) as events:
            finished = [each.event async for each in events if isinstance(each.event, Finished)]
    return finished[0].usage.cached_input_tokens


async def test_every_tenants_prompts_begin_with_it_until_it_is_withdrawn(
    admin: Administered,
) -> None:
    await admin.create("red")
    await admin.create("blue")
    made = await admin.stub.PublishPrefix(request(), metadata=admin.operator)
    hits = [await cached(admin, await admin.key(tenant)) for tenant in ("red", "blue")]
    withdrawal = pb.WithdrawPrefixRequest(name=made.name)
    await admin.stub.WithdrawPrefix(withdrawal, metadata=admin.operator)
    await admin.create("green")
    after = await cached(admin, await admin.key("green"))

    assert (made.name, made.token_count, made.resident) == ("publishedPrefixes/system", 40, True)
    assert made.kv_bytes > 0
    assert hits == [40, 40]
    assert after == 0
    assert await listed(admin) == []


async def test_it_is_in_the_audit_log_and_what_it_says_is_not(admin: Administered) -> None:
    await admin.stub.PublishPrefix(request(), metadata=admin.operator)
    events = await admin.stub.ListAuditEvents(
        pb.ListAuditEventsRequest(parent="tenants/operators"), metadata=admin.operator
    )
    (event,) = [each for each in events.audit_events if each.method == "PublishPrefix"]

    assert event.target == "publishedPrefixes/system"
    assert event.change == '{"model":"","policy":"","withdrawn":false}'


@pytest.mark.parametrize("method", ["PublishPrefix", "ListPublishedPrefixes", "WithdrawPrefix"])
async def test_tenants_administrators_may_not(method: str, admin: Administered) -> None:
    await admin.create("red")
    key = bearer(await admin.key("red", ADMIN))
    requests = {
        "PublishPrefix": request(),
        "ListPublishedPrefixes": pb.ListPublishedPrefixesRequest(),
        "WithdrawPrefix": pb.WithdrawPrefixRequest(name="publishedPrefixes/system"),
    }
    refusal = await refusal_of(getattr(admin.stub, method)(requests[method], metadata=key))

    assert refusal.reason == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request(name="No"), "INVALID_FIELD"),
        (request(model="other"), "MODEL_NOT_FOUND"),
        (request(policy="nonsense"), "INVALID_FIELD"),
        (request(ids=[5] * 100_000), "CONTEXT_TOO_LONG"),
        (request(ids=[]), "INVALID_FIELD"),
    ],
    ids=["id", "model", "policy", "length", "nothing"],
)
async def test_what_is_refused_leaves_nothing(
    asked: pb.PublishPrefixRequest, reason: str, admin: Administered
) -> None:
    refusal = await refusal_of(admin.stub.PublishPrefix(asked, metadata=admin.operator))

    assert refusal.reason == reason
    assert await listed(admin) == []
    again = await admin.stub.PublishPrefix(request(), metadata=admin.operator)
    assert again.resident


async def test_an_engine_that_is_started_later_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "SYNC_INTERVAL_S", 0.01)
    database = tmp_path / "tenants.sqlite"
    async with real_engine() as engine, administered(database, engine) as admin:
        await admin.stub.PublishPrefix(request(), metadata=admin.operator)
        await admin.create("red")
        secret, key = admin.secret, await admin.key("red")
    async with real_engine() as engine, administered(database, engine, operator=secret) as admin:
        before = await engine.list_contexts(PUBLISHED)
        while not (await listed(admin))[0].resident:
            pass
        assert await cached(admin, key) == 40

    assert before == ()


async def test_an_id_is_published_once(admin: Administered) -> None:
    await admin.stub.PublishPrefix(request(), metadata=admin.operator)
    refusal = await refusal_of(admin.stub.PublishPrefix(request(), metadata=admin.operator))

    assert refusal.reason == "RESOURCE_EXISTS"


class Kept:
    """What was published, whatever becomes of it."""

    def __init__(self, *prefixes: PublishedPrefix) -> None:
        self._prefixes = prefixes

    def published(self) -> Sequence[PublishedPrefix]:
        return self._prefixes


async def test_one_that_no_engine_takes_does_not_keep_the_others_away() -> None:
    system = PublishedPrefix(prefix="system", packed_ids=pack_ids(IDS))
    broken = PublishedPrefix(prefix="broken", packed_ids=pack_ids(IDS), policy="nonsense")
    async with real_engine() as engine:
        await PublishedPrefixes(cast("TenantStore", Kept(broken, system)), [engine])._sync()

        (record,) = await engine.list_contexts(PUBLISHED)
        assert (record.context_id, record.state) == ("system", ContextState.ACTIVE)


async def test_one_that_could_not_be_computed_is_tried_again() -> None:
    prefixes = Kept(PublishedPrefix(prefix="system", packed_ids=pack_ids(IDS)))
    async with real_engine() as engine:
        contexts = cast("EngineService", engine)._contexts
        context = contexts.open(ContextRequest(tenant=PUBLISHED, context_id="system"))
        assert context.build is not None
        contexts.fail(context.build, QuotaExceeded("no block even alone"))
        await PublishedPrefixes(cast("TenantStore", prefixes), [engine])._sync()

        assert (await engine.get_context(PUBLISHED, "system")).state is ContextState.ACTIVE
