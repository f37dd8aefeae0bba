"""Administrators list what a tenant keeps in the prefix cache, and have it given up."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcluster.client import Client
from kvcluster.engine.api import Backend
from kvcluster.engine.cache_api import CacheAmount, CacheEntry, CachePurge, CachePurged, Standing
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.types import TenantId
from tests.attacks.attacked import real_engine
from tests.unit.cli.conftest import run
from tests.unit.router.administering import (
    ADMIN,
    VIEWER,
    Administered,
    administered,
    bearer,
)
from tests.unit.router.fake_backend import FakeBackend
from tests.unit.router.serving import refusal_of

IDS = [position * position % 60 + 1 for position in range(40)]
PARENT = "tenants/red"
RED, BLUE = TenantId("red"), TenantId("blue")


@dataclass
class Cluster:
    """One engine behind a router, and two tenants who asked the same."""

    admin: Administered
    engine: Backend
    secrets: dict[str, str]

    async def ask(self, tenant: str, ids: list[int], namespace: str = "") -> None:
        async with Client(self.admin.door.address, api_key=self.secrets[tenant]) as client:
            asking = client.generate(prompt_ids=ids, max_output_tokens=1, cache_namespace=namespace)
            async with aclosing(asking) as events:
                async for _ in events:
                    pass

    async def listed(self, parent: str = PARENT, **fields: object) -> pb.ListCacheEntriesResponse:
        request = pb.ListCacheEntriesRequest(parent=parent, **fields)  # type: ignore[arg-type]
        return await self.admin.stub.ListCacheEntries(request, metadata=self.admin.operator)

    async def purged(self, parent: str = PARENT, **fields: object) -> pb.PurgeCacheEntriesResponse:
        request = pb.PurgeCacheEntriesRequest(parent=parent, **fields)  # type: ignore[arg-type]
        return await self.admin.stub.PurgeCacheEntries(request, metadata=self.admin.operator)

    async def refused(self, request: object) -> str:
        method = type(request).__name__.removesuffix("Request")
        call = getattr(self.admin.stub, method)
        return (await refusal_of(call(request, metadata=self.admin.operator))).reason

    async def events(self) -> list[pb.AuditEvent]:
        request = pb.ListAuditEventsRequest(parent=PARENT, filter="method=PurgeCacheEntries")
        found = await self.admin.stub.ListAuditEvents(request, metadata=self.admin.operator)
        return list(found.audit_events)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with (
        real_engine() as engine,
        administered(tmp_path / "tenants.sqlite", engine) as admin,
    ):
        for tenant in (RED, BLUE):
            await admin.create(tenant)
        secrets = {tenant: await admin.key(tenant) for tenant in (RED, BLUE)}
        made = Cluster(admin, engine, secrets)
        for tenant in (RED, BLUE):
            await made.ask(tenant, IDS)
        yield made


async def test_an_entry_has_a_name_and_says_what_it_takes(cluster: Cluster) -> None:
    (entry,) = (await cluster.listed()).cache_entries

    assert entry.name.startswith("tenants/red/cacheEntries/")
    assert (entry.model, entry.policy, entry.cache_namespace) == ("fake", "exact", "")
    assert (entry.start_token, entry.token_count) == (0, 40)
    assert entry.kv_bytes == 40 * 4 * (4 + 4)
    assert entry.state == pb.CacheEntry.STATE_IDLE
    assert entry.last_use_time.seconds > 0


async def test_a_purge_leaves_the_other_tenants_entries(cluster: Cluster) -> None:
    others = await cluster.listed("tenants/blue")
    (entry,) = (await cluster.listed()).cache_entries
    told = await cluster.purged()

    assert (told.purged.entries, told.purged.kv_bytes) == (1, entry.kv_bytes)
    assert told.in_use.entries == told.in_contexts.entries == told.followed.entries == 0
    assert not (await cluster.listed()).cache_entries
    assert await cluster.listed("tenants/blue") == others
    assert await cluster.engine.list_cache_entries(RED) == ()


async def test_pages_hold_every_entry_once(cluster: Cluster) -> None:
    for start in range(1, 5):
        await cluster.ask(RED, [start, *IDS])
    whole = (await cluster.listed()).cache_entries
    paged, token = [], ""
    while True:
        page = await cluster.listed(page_size=2, page_token=token)
        paged += page.cache_entries
        token = page.next_page_token
        if not token:
            break

    assert len(whole) == 5
    assert [each.name for each in paged] == sorted(each.name for each in whole)


async def test_only_what_is_named_goes(cluster: Cluster) -> None:
    await cluster.ask(RED, IDS, "ann")
    first, second = (await cluster.listed()).cache_entries
    told = await cluster.purged(names=[first.name])

    assert told.purged.entries == 1
    assert [each.name for each in (await cluster.listed()).cache_entries] == [second.name]


@pytest.mark.parametrize("namespace", ["", "ann"])
async def test_only_the_namespace_that_is_named_goes(cluster: Cluster, namespace: str) -> None:
    await cluster.ask(RED, IDS, "ann")
    await cluster.purged(cache_namespace=namespace)

    (left,) = (await cluster.listed()).cache_entries
    assert {left.cache_namespace, namespace} == {"", "ann"}


async def test_a_purge_is_in_the_audit_log_with_what_was_asked(cluster: Cluster) -> None:
    (entry,) = (await cluster.listed()).cache_entries
    await cluster.purged(names=[entry.name], cache_namespace="")
    (event,) = await cluster.events()

    assert event.target == PARENT
    entry_id = entry.name.rpartition("/")[2]
    assert json.loads(event.change) == {"entries": [entry_id], "cache_namespace": ""}


async def test_validation_says_the_same_and_is_in_no_log(cluster: Cluster) -> None:
    said = await cluster.purged(validate_only=True)

    assert await cluster.events() == []
    assert await cluster.purged() == said
    assert said.purged.entries == 1


async def test_names_that_are_not_there_or_not_the_tenants_are_refused_alike(
    cluster: Cluster,
) -> None:
    (foreign,) = (await cluster.listed("tenants/blue")).cache_entries
    (own,) = (await cluster.listed()).cache_entries
    for entry in (foreign.name.rpartition("/")[2], "never"):
        names = [own.name, f"{PARENT}/cacheEntries/{entry}"]
        request = pb.PurgeCacheEntriesRequest(parent=PARENT, names=names)
        assert await cluster.refused(request) == "RESOURCE_NOT_FOUND"
    request = pb.PurgeCacheEntriesRequest(parent=PARENT, names=[foreign.name])
    assert await cluster.refused(request) == "INVALID_FIELD"

    assert len((await cluster.listed()).cache_entries) == 1
    assert len((await cluster.listed("tenants/blue")).cache_entries) == 1
    assert await cluster.events() == []


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.ListCacheEntriesRequest(parent="tenants/none"), "RESOURCE_NOT_FOUND"),
        (pb.ListCacheEntriesRequest(parent="red"), "INVALID_FIELD"),
        (pb.ListCacheEntriesRequest(parent=PARENT, page_token="?"), "INVALID_FIELD"),
        (pb.ListCacheEntriesRequest(parent=PARENT, page_size=-1), "INVALID_FIELD"),
        (pb.PurgeCacheEntriesRequest(parent="tenants/none"), "RESOURCE_NOT_FOUND"),
        (pb.PurgeCacheEntriesRequest(parent=PARENT, names=["one"]), "INVALID_FIELD"),
        (
            pb.PurgeCacheEntriesRequest(
                parent=PARENT, names=[f"{PARENT}/cacheEntries/{i}" for i in range(1001)]
            ),
            "INVALID_FIELD",
        ),
    ],
    ids=["tenant", "parent", "token", "size", "purged tenant", "name", "names"],
)
async def test_bad_input_is_refused_and_gives_up_nothing(
    request_: object, reason: str, cluster: Cluster
) -> None:
    assert await cluster.refused(request_) == reason
    assert len((await cluster.listed()).cache_entries) == 1


async def test_a_viewer_lists_and_an_admin_purges_its_own(cluster: Cluster) -> None:
    viewer, admin = [bearer(await cluster.admin.key(RED, role)) for role in (VIEWER, ADMIN)]
    stub = cluster.admin.stub
    listing = pb.ListCacheEntriesRequest(parent=PARENT)
    purging = pb.PurgeCacheEntriesRequest(parent=PARENT)

    assert len((await stub.ListCacheEntries(listing, metadata=viewer)).cache_entries) == 1
    refusal = await refusal_of(stub.PurgeCacheEntries(purging, metadata=viewer))
    assert refusal.reason == "PERMISSION_DENIED"
    assert (await stub.PurgeCacheEntries(purging, metadata=admin)).purged.entries == 1


async def test_the_shell_lists_and_purges_by_id(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.ask(RED, IDS, "ann")
    (tmp_path / "key").write_text(cluster.admin.secret)
    flags = ["--server", cluster.admin.door.admin_address, "--json"]
    flags += ["--api-key-file", str(tmp_path / "key")]
    listing = await run("tenants", "list-cache-entries", "red", *flags)
    entries = json.loads(listing.stdout)["cache_entries"]
    (ann,) = [each["name"] for each in entries if each["cache_namespace"] == "ann"]
    by_id = await run("tenants", "purge-cache-entries", "red", ann.rpartition("/")[2], *flags)
    rest = await run("tenants", "purge-cache-entries", "red", "--namespace", "", *flags)

    assert len(entries) == 2
    assert json.loads(by_id.stdout)["purged"]["entries"] == "1"
    assert json.loads(rest.stdout)["purged"]["entries"] == "1"
    assert not (await cluster.listed()).cache_entries


class Keeping(FakeBackend):
    """An engine that keeps one idle entry for each of these ids."""

    def __init__(self, *ids: str) -> None:
        super().__init__()
        self.ids = set(ids)

    async def list_cache_entries(self, _tenant: TenantId) -> tuple[CacheEntry, ...]:
        return tuple(
            CacheEntry(
                entry=each,
                model="echo",
                policy="exact",
                cache_namespace="",
                start_token=0,
                num_tokens=8,
                num_bytes=64,
                standing=Standing.IDLE,
                last_use_s=0.0,
            )
            for each in self.ids
        )

    async def purge_cache_entries(self, _tenant: TenantId, wanted: CachePurge) -> CachePurged:
        found = self.ids & set(wanted.entries) if wanted.entries else self.ids
        if not wanted.validates_only:
            self.ids = self.ids - found
        given_up = CacheAmount(len(found), 64 * len(found))
        return CachePurged(given_up=given_up, found=frozenset(found & set(wanted.entries)))


async def test_all_engines_are_asked_and_their_answers_summed(tmp_path: Path) -> None:
    first, second = Keeping("a", "c"), Keeping("b", "d")
    async with administered(tmp_path / "tenants.sqlite", first, second) as admin:
        await admin.create(RED)
        request = pb.ListCacheEntriesRequest(parent=PARENT)
        listed = await admin.stub.ListCacheEntries(request, metadata=admin.operator)
        names = [each.name for each in listed.cache_entries]
        some = pb.PurgeCacheEntriesRequest(parent=PARENT, names=names[:2])
        told = await admin.stub.PurgeCacheEntries(some, metadata=admin.operator)
        assert names == [f"{PARENT}/cacheEntries/{each}" for each in "abcd"]
        assert (told.purged.entries, told.purged.kv_bytes) == (2, 128)
        assert (first.ids, second.ids) == ({"c"}, {"d"})

        refusal = await refusal_of(admin.stub.PurgeCacheEntries(some, metadata=admin.operator))
        assert refusal.reason == "RESOURCE_NOT_FOUND"
