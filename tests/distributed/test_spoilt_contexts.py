"""What was changed, erased or found no room on disk gives a typed error, and harms no other."""

import asyncio
import resource
import shutil
import sqlite3
from array import array
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvcluster.config import ClusterConfig, TenancyConfig
from kvcluster.engine.context_api import ContextState
from kvcluster.errors import (
    ContextNotFound,
    SealedCacheDamaged,
    SpillDiskFull,
)
from kvcluster.tenancy.limits import Tier
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import DEFAULT_TENANT
from tests.distributed.stored_contexts import (
    KEY,
    files_in,
    finished,
    num_charged,
    on_disk,
    shares,
    stored,
    stored_config,
    storing,
)
from tests.distributed.test_contexts import (
    BOOK,
    QUESTION,
    generate,
    uploaded,
)
from tests.served_model import served_model
from tests.thread_executor import running_engine

Spoil = Callable[[Path, Path], None]


def flipped(file: Path, _: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


def truncated(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def missing(file: Path, _: Path) -> None:
    file.unlink()


def swapped(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def replayed(file: Path, _: Path) -> None:
    shutil.copyfile(file.parents[2] / "earlier" / file.name, file)


@pytest.mark.parametrize("spoil", [flipped, truncated, missing, swapped, replayed])
async def test_a_file_that_was_changed_is_refused_and_no_other_context_suffers(
    spoil: Spoil, tmp_path: Path
) -> None:
    async with storing(tmp_path, 1) as service:
        await stored(service, BOOK, "whole")
        (other,) = [file.parent for file in files_in(tmp_path) if "00000" in file.name]
        await stored(service, BOOK[:100], "book")
        (first,) = {file.parent for file in files_in(tmp_path)} - {other}
        shutil.copytree(first, tmp_path / "earlier")
        await service.delete_context(DEFAULT_TENANT, "book", "")
        await stored(service, BOOK[::-1], "book")
        (own,) = {file.parent for file in files_in(tmp_path)} - {other}
    spoil(own / "part-00000.sealed", other / "part-00000.sealed")
    async with storing(tmp_path, 2) as service:
        for _ in range(2):
            with pytest.raises(SealedCacheDamaged, match="context book is damaged on disk"):
                await generate(service, QUESTION, context="book")
        record = await service.get_context(DEFAULT_TENANT, "book")
        output, usage = await generate(service, QUESTION, context="whole")
        expected, _ = await generate(service, [*BOOK, *QUESTION])
        num_used = service._engine.parts.partitions.num_used
        await service.delete_context(DEFAULT_TENANT, "book", "")
        await service.delete_context(DEFAULT_TENANT, "whole", "")
        left = files_in(tmp_path)

    assert (record.state, record.tiers) == (ContextState.DAMAGED, ())
    assert (output, usage.cached_input_tokens) == (expected, 144)
    assert num_used == 9, "nothing is left of what was begun to be read"
    assert left == []


async def test_a_context_whose_note_was_changed_is_listed_as_damaged(tmp_path: Path) -> None:
    async with storing(tmp_path, 1) as service:
        await uploaded(service, BOOK)
        await on_disk(service)
    truncated(next(file for file in files_in(tmp_path) if "00001" in file.name), tmp_path)
    async with storing(tmp_path, 1) as service:
        (record,) = await service.list_contexts(DEFAULT_TENANT)
        with pytest.raises(SealedCacheDamaged, match="delete it and upload it again"):
            await generate(service, QUESTION, context="book")
        await service.delete_context(DEFAULT_TENANT, "book", "")
        again = await uploaded(service, BOOK)

    assert (record.context_id, record.state) == ("book", ContextState.DAMAGED)
    assert again.state is ContextState.ACTIVE


@pytest.mark.parametrize("is_told", [False, True], ids=["one tenant", "keys are told"])
@pytest.mark.parametrize("column", ["record", "receipts"])
async def test_a_context_whose_row_cannot_be_read_is_damaged_alone(
    column: str, is_told: bool, tmp_path: Path
) -> None:
    model = served_model("llama")
    config = with_tenants(tmp_path) if is_told else stored_config(tmp_path)
    async with running_engine(model, config) as (service, _):
        await service.apply_shares(shares(1, {1: KEY}))
        await stored(service, BOOK, "book")
        await stored(service, BOOK[::-1], "other")
        charged = num_charged(service)
    with sqlite3.connect(tmp_path / "index.sqlite") as intruder:
        intruder.execute(f"UPDATE spills SET {column} = x'c1' WHERE context = 'book'")
    intruder.close()
    async with running_engine(model, config) as (service, _):
        await service.apply_shares(shares(1, {1: KEY}))
        await service.apply_shares(shares(2, {1: KEY}))
        listed = await service.list_contexts(DEFAULT_TENANT)
        still_charged = num_charged(service)
        with pytest.raises(SealedCacheDamaged, match="delete it and upload it again"):
            await generate(service, QUESTION, context="book")
        output, usage = await generate(service, QUESTION, context="other")
        expected, _ = await generate(service, [*BOOK[::-1], *QUESTION])
        await service.delete_context(DEFAULT_TENANT, "book", "")
        left = num_charged(service)
        on_the_disk = sum(file.stat().st_size for file in files_in(tmp_path))

    assert [(each.context_id, each.state) for each in listed] == [
        ("book", ContextState.DAMAGED),
        ("other", ContextState.ACTIVE),
    ]
    assert listed[0].disk_bytes + listed[1].disk_bytes == still_charged == charged
    assert left == listed[1].disk_bytes == on_the_disk
    assert (output, usage.cached_input_tokens) == (expected, 144)


async def test_a_deleted_tenants_row_that_cannot_be_read_goes_with_it(tmp_path: Path) -> None:
    model = served_model("llama")
    async with running_engine(model, with_tenants(tmp_path)) as (service, _):
        await service.apply_shares(shares(1, {1: KEY}))
        await stored(service, BOOK, "book")
    with sqlite3.connect(tmp_path / "index.sqlite") as intruder:
        intruder.execute("UPDATE spills SET record = x'c1'")
    intruder.close()
    async with running_engine(model, with_tenants(tmp_path)) as (service, _):
        await service.apply_shares(shares(2, None, deleted=((DEFAULT_TENANT, "uid-1"),)))

        assert files_in(tmp_path) == []
        assert num_charged(service) == 0


async def test_no_plain_byte_of_a_context_is_in_the_folder(tmp_path: Path) -> None:
    async with running_engine(served_model("llama"), stored_config(tmp_path)) as (
        service,
        executor,
    ):
        await uploaded(service, BOOK)
        await on_disk(service)
        planes = [plane for each in executor.runners for plane in each._store.planes(0)]
        canaries = {
            token.numpy().tobytes()
            for plane in planes
            for token in plane.flatten(0, 2)
            if token.count_nonzero()
        }
    content = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    assert len(canaries) > len(BOOK)
    assert not any(canary in content for canary in canaries)
    assert array("I", BOOK).tobytes()[:32] not in content


def with_tenants(folder: Path) -> ClusterConfig:
    """Routers tell the keys."""
    return replace(stored_config(folder), tenancy=TenancyConfig(database="unused"))


async def test_contexts_are_found_when_their_tenants_keys_come(tmp_path: Path) -> None:
    model = served_model("llama")
    async with running_engine(model, with_tenants(tmp_path)) as (service, _):
        await service.apply_shares(shares(1, {1: KEY}))
        await stored(service, BOOK, "book")
    async with running_engine(model, with_tenants(tmp_path)) as (service, _):
        asking = asyncio.ensure_future(service.get_context(DEFAULT_TENANT, "book"))
        await service.apply_shares(shares(1, {1: KEY, 2: KEY[::-1]}))
        record = await asking
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert record.tiers == (Tier.DISK,)
    assert output == expected


@pytest.mark.parametrize(
    "erased",
    [shares(2, {2: KEY[::-1]}), shares(2, None, deleted=((DEFAULT_TENANT, "uid-1"),))],
    ids=["the key", "the tenant"],
)
@pytest.mark.parametrize("is_restarted", [False, True])
async def test_what_an_erased_key_sealed_is_gone_from_memory_and_disk(
    erased: TenantShares, is_restarted: bool, tmp_path: Path
) -> None:
    model = served_model("llama")
    async with AsyncExitStack() as stack:
        begun = await stack.enter_async_context(running_engine(model, with_tenants(tmp_path)))
        await begun[0].apply_shares(shares(1, {1: KEY}))
        await stored(begun[0], BOOK, "book")
        if is_restarted:
            await stack.aclose()
            begun = await stack.enter_async_context(running_engine(model, with_tenants(tmp_path)))
        service = begun[0]
        await service.apply_shares(erased)
        while service._contexts.all():
            await service._contexts.all()[0].changed.wait()

        assert files_in(tmp_path) == []
        assert num_charged(service) == 0
        assert service._engine.parts.partitions.num_used == 0


async def test_a_database_that_does_not_know_the_tenant_destroys_nothing(tmp_path: Path) -> None:
    model = served_model("llama")
    async with running_engine(model, with_tenants(tmp_path)) as (service, _):
        await service.apply_shares(shares(1, {1: KEY}))
        await stored(service, BOOK, "book")
        left = len(files_in(tmp_path))
    async with running_engine(model, with_tenants(tmp_path)) as (service, _):
        await service.apply_shares(TenantShares(revision=7))
        with pytest.raises(ContextNotFound):
            await service.get_context(DEFAULT_TENANT, "book")

    assert len(files_in(tmp_path)) == left > 0


@contextmanager
def little_room(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so much, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_on_a_full_disk_nothing_is_left_and_the_context_stays_in_memory(
    tmp_path: Path,
) -> None:
    async with storing(tmp_path) as service:
        with little_room(40_000), pytest.raises(SpillDiskFull, match="delete some, or make room"):
            await finished(service, BOOK, "book", durable=True)
        record = await service.get_context(DEFAULT_TENANT, "book")
        left, charged = files_in(tmp_path), num_charged(service)
        await generate(service, QUESTION, context="book")
        again = await on_disk(service)

    assert record.tiers == (Tier.GPU,)
    assert record.message.startswith("not on disk: no room on the disk")
    assert (left, charged) == ([], 0)
    assert again.tiers == (Tier.GPU, Tier.DISK), "when it is used again, it is written"
    assert again.message == ""
