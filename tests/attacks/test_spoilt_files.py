"""Files of a context that somebody changes, cuts short, swaps, puts back or reorders, and a disk
without room: what the tenant is told through the port, after a restart of everything, and that
nobody else suffers."""

import resource
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from kvcluster.admin_client import AdminClient
from kvcluster.client import Client
from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.engine.api import Output
from kvcluster.engine.context_api import ContextState
from kvcluster.errors import SealedCacheDamaged, SpillDiskFull
from kvcluster.router.front_door import FrontDoor
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.limits import Tier
from kvcluster.types import TenantId
from tests.distributed.stored_contexts import files_in, stored_config
from tests.distributed.test_contexts import BOOK, QUESTION
from tests.served_model import served_model
from tests.thread_executor import running_engine
from tests.unit.router.administering import INFERENCE, bootstrap

RED_BOOK, RED_OTHER = "tenants/red/contexts/book", "tenants/red/contexts/other"
BLUE_BOOK = "tenants/blue/contexts/book"
PARTS = ("part-00000.sealed", "part-00001.sealed")


class Folders(NamedTuple):
    """Where contexts lie: the victim's, its earlier state under the same name, another one of the
    same tenant, and another tenant's under the same name."""

    own: Path
    earlier: Path
    other: Path
    foreign: Path


Spoil = Callable[[Folders], object]


def tampered(found: Folders) -> None:
    content = bytearray((found.own / PARTS[0]).read_bytes())
    content[len(content) * 2 // 3] ^= 1
    (found.own / PARTS[0]).write_bytes(content)


def truncated(found: Folders) -> None:
    content = (found.own / PARTS[0]).read_bytes()
    (found.own / PARTS[0]).write_bytes(content[: len(content) // 2])


def swapped(found: Folders) -> None:
    shutil.copyfile(found.other / PARTS[0], found.own / PARTS[0])


def swapped_with_a_foreign_one(found: Folders) -> None:
    shutil.copyfile(found.foreign / PARTS[0], found.own / PARTS[0])


def replayed(found: Folders) -> None:
    for part in PARTS:
        shutil.copyfile(found.earlier / part, found.own / part)


def reordered(found: Folders) -> None:
    first, second = ((found.own / part).read_bytes() for part in PARTS)
    (found.own / PARTS[0]).write_bytes(second)
    (found.own / PARTS[1]).write_bytes(first)


SPOILT = (tampered, truncated, swapped, swapped_with_a_foreign_one, replayed, reordered)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[FrontDoor]:
    """Everything but Ray, with two ranks, until it is stopped altogether."""
    tenancy = TenancyConfig(database=str(folder / "tenants.sqlite"), admin_listen="127.0.0.1:0")
    config = replace(stored_config(folder), tenancy=tenancy)
    async with running_engine(served_model("llama"), config) as (service, _):
        door = FrontDoor([service], RouterConfig(listen="127.0.0.1:0"), tenancy)
        await door.start()
        try:
            yield door
        finally:
            await door.stop(grace_s=0)


async def keys_of(door: FrontDoor, operator: str) -> dict[str, str]:
    """Of two new tenants."""
    keys = {}
    async with AdminClient(door.admin_address, api_key=operator) as admin:
        for tenant in ("red", "blue"):
            await admin.ask(pb.CreateTenantRequest(tenant_id=tenant))
            key = pb.ApiKey(role=INFERENCE)
            request = pb.CreateApiKeyRequest(parent=f"tenants/{tenant}", api_key=key)
            made = await admin.ask(request)
            assert isinstance(made, pb.CreateApiKeyResponse)
            keys[tenant] = made.secret
    return keys


@asynccontextmanager
async def tenants(door: FrontDoor, keys: dict[str, str]) -> AsyncIterator[tuple[Client, Client]]:
    async with (
        Client(door.address, api_key=keys["red"]) as red,
        Client(door.address, api_key=keys["blue"]) as blue,
    ):
        yield red, blue


async def upload(client: Client, folder: Path, name: str, tenant: str, ids: list[int]) -> Path:
    """Store a context; returns where it lies."""
    before = {file.parent for file in files_in(folder)}
    await client.upload_context(name, prompt_ids=ids, tenant=TenantId(tenant), durable=True)
    (made,) = {file.parent for file in files_in(folder)} - before
    return made


async def answer(client: Client, **options: object) -> list[int]:
    events = client.generate(
        prompt_ids=QUESTION,
        max_output_tokens=8,
        ignore_eos=True,
        **options,  # type: ignore[arg-type]
    )
    return [
        token
        async for event in events
        if isinstance(event.event, Output)
        for token in event.event.token_ids
    ]


@pytest.mark.parametrize("spoil", [None, *SPOILT])
async def test_a_spoilt_file_is_refused_to_its_tenant_and_no_other_context_suffers(
    spoil: Spoil | None, tmp_path: Path
) -> None:
    """With the control that what nobody has spoilt is read."""
    operator = bootstrap(tmp_path / "tenants.sqlite")
    async with serving(tmp_path) as door:
        keys = await keys_of(door, operator)
        async with tenants(door, keys) as (red, blue):
            first = await upload(red, tmp_path, "book", "red", BOOK[::-1])
            earlier = shutil.copytree(first, tmp_path / "earlier")
            await red.delete_context("book", tenant=TenantId("red"))
            own = await upload(red, tmp_path, "book", "red", BOOK)
            other = await upload(red, tmp_path, "other", "red", BOOK[::-1])
            foreign = await upload(blue, tmp_path, "book", "blue", BOOK)
            expected = [
                await answer(client, context=name)
                for client, name in ((red, RED_BOOK), (red, RED_OTHER), (blue, BLUE_BOOK))
            ]
    if spoil is not None:
        spoil(Folders(own, earlier, other, foreign))
    async with serving(tmp_path) as door, tenants(door, keys) as (red, blue):
        if spoil is None:
            assert await answer(red, context=RED_BOOK) == expected[0]
        else:
            for _ in range(2):
                with pytest.raises(SealedCacheDamaged, match="delete it and upload it again"):
                    await answer(red, context=RED_BOOK)
            record = await red.get_context("book", tenant=TenantId("red"))
            assert record.state is ContextState.DAMAGED
        assert await answer(red, context=RED_OTHER) == expected[1]
        assert await answer(blue, context=BLUE_BOOK) == expected[2]


@contextmanager
def little_room(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so much, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_on_a_full_disk_a_durable_upload_is_refused_and_both_tenants_are_served(
    tmp_path: Path,
) -> None:
    operator = bootstrap(tmp_path / "tenants.sqlite")
    async with serving(tmp_path) as door:
        keys = await keys_of(door, operator)
        async with tenants(door, keys) as (red, blue):
            with little_room(40_000), pytest.raises(SpillDiskFull, match="make room"):
                await upload(red, tmp_path, "book", "red", BOOK)
            left = files_in(tmp_path)
            record = await red.get_context("book", tenant=TenantId("red"))
            served = [await answer(red, context=RED_BOOK), await answer(blue)]
            await upload(red, tmp_path, "other", "red", BOOK)

    assert left == []
    assert record.tiers == (Tier.GPU,)
    assert record.message.startswith("not on disk: no room on the disk")
    assert [len(tokens) for tokens in served] == [8, 8]
