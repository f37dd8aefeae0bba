"""Contexts in the host's memory: they come back without a disk, move to disk as they are sealed,
and leave nothing when they go."""

import shutil
from array import array
from pathlib import Path

import pytest

from kvcluster.engine.context_api import ContextRecord, ContextRequest, ContextState
from kvcluster.engine.service import EngineService
from kvcluster.errors import (
    ContextNotFound,
    InvalidField,
    RankLost,
    SealedCacheDamaged,
)
from kvcluster.tenancy.limits import Tier
from kvcluster.types import DEFAULT_TENANT
from tests.distributed.host_contexts import (
    check_books,
    give_up,
    host_config,
    hosting,
    in_memory,
    memory,
    needs_memory,
    one_context,
)
from tests.distributed.stored_contexts import files_in, finished, num_charged, stored
from tests.distributed.test_contexts import BOOK, MORE, QUESTION, generate, uploaded
from tests.served_model import served_model
from tests.thread_executor import running_engine

__all__ = ["memory"]

pytestmark = needs_memory


async def record(service: EngineService, context_id: str = "book") -> ContextRecord:
    await service._stores.wait_idle()
    return await service.get_context(DEFAULT_TENANT, context_id)


@pytest.mark.parametrize(
    ("architecture", "policy", "num_ranks"),
    [("llama", "exact", 3), ("llama", "int4", 2), ("gemma2", "int4", 3), ("llama", "int4", 1)],
)
async def test_what_was_given_up_comes_back_with_no_disk_at_all(
    architecture: str, policy: str, num_ranks: int, memory: Path
) -> None:
    settings = host_config(memory, num_ranks=num_ranks)
    async with running_engine(served_model(architecture), settings) as (service, _):
        await uploaded(service, BOOK, policy)
        kept = await record(service)
        give_up(service)
        given_up = await record(service)
        output, usage = await generate(service, QUESTION, context="book")
        back = await record(service)
        check_books(service, memory)
        expected, _ = await generate(service, [*BOOK, *QUESTION], policy=policy)

    assert kept.tiers == back.tiers == (Tier.GPU, Tier.HOST)
    assert (given_up.tiers, given_up.state) == ((Tier.HOST,), ContextState.ACTIVE)
    assert (given_up.kv_bytes, given_up.host_bytes) == (0, kept.host_bytes)
    assert kept.host_bytes > 0
    assert (output, usage.cached_input_tokens) == (expected, 144)


async def test_the_disk_is_not_read_for_what_is_in_the_hosts_memory(
    memory: Path, tmp_path: Path
) -> None:
    async with hosting(memory, tmp_path) as service:
        both = await finished(service, BOOK, "book", durable=True)
        for file in files_in(tmp_path):
            file.write_bytes(b"")
        give_up(service)
        output, usage = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert both.tiers == (Tier.GPU, Tier.HOST, Tier.DISK)
    assert (output, usage.cached_input_tokens) == (expected, 144)


async def test_a_restart_loses_what_was_not_durable(memory: Path, tmp_path: Path) -> None:
    async with hosting(memory, tmp_path, num_ranks=3) as service:
        durable = await finished(service, BOOK, "book", durable=True)
        await stored(service, BOOK[::-1], "other")
        other = await service.get_context(DEFAULT_TENANT, "other")
    left = in_memory(memory)
    async with hosting(memory, tmp_path, num_ranks=2) as service:
        with pytest.raises(ContextNotFound):
            await service.get_context(DEFAULT_TENANT, "other")
        found = await service.get_context(DEFAULT_TENANT, "book")
        output, _ = await generate(service, QUESTION, context="book")
        near = await record(service)
        check_books(service, memory)
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert durable.tiers == (Tier.GPU, Tier.HOST, Tier.DISK)
    assert other.tiers == (Tier.GPU, Tier.HOST)
    assert left == []
    assert found.tiers == (Tier.DISK,)
    assert near.tiers == (Tier.GPU, Tier.HOST, Tier.DISK), "what is read from disk is nearer then"
    assert output == expected


async def test_a_lost_ring_has_its_contexts_in_the_hosts_memory_still(memory: Path) -> None:
    settings = host_config(memory)
    async with running_engine(served_model("llama"), settings) as (service, executor):
        await stored(service, BOOK, "book")
        service.lose_ring("rank 1 is gone")
        lost = await service.get_context(DEFAULT_TENANT, "book")
        with pytest.raises(RankLost):
            await generate(service, QUESTION, context="book")
        executor.start_again(epoch=2)
        service.restart(2)
        service.mark_ready()
        output, usage = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert lost.tiers == (Tier.HOST,)
    assert (output, usage.cached_input_tokens) == (expected, 144)


async def test_the_least_recently_used_moves_to_disk_when_there_is_no_room(
    memory: Path, tmp_path: Path
) -> None:
    size = await one_context(memory)
    async with hosting(memory, tmp_path, capacity=2 * size) as service:
        await stored(service, BOOK, "book")
        await stored(service, BOOK[::-1], "two")
        await generate(service, QUESTION, context="book")
        await stored(service, [*MORE, *BOOK[37:]], "three")
        check_books(service, memory)
        tiers = {
            context.context_id: context.tiers
            for context in await service.list_contexts(DEFAULT_TENANT)
        }
        give_up(service)
        output, usage = await generate(service, QUESTION, context="two")
        expected, _ = await generate(service, [*BOOK[::-1], *QUESTION])
        await service._stores.wait_idle()
        charged = num_charged(service)
        check_books(service, memory)

    assert tiers == {
        "book": (Tier.GPU, Tier.HOST),
        "three": (Tier.GPU, Tier.HOST),
        "two": (Tier.GPU, Tier.DISK),
    }
    assert charged == sum(file.stat().st_size for file in files_in(tmp_path))
    assert (output, usage.cached_input_tokens) == (expected, 144)


async def test_without_a_disk_what_leaves_is_computed_again(memory: Path) -> None:
    size = await one_context(memory)
    async with hosting(memory, capacity=size) as service:
        await stored(service, BOOK, "book")
        await stored(service, BOOK[::-1], "two")
        check_books(service, memory)
        left = await record(service)
        give_up(service)
        degraded = await record(service)
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert left.tiers == (Tier.GPU,)
    assert (degraded.tiers, degraded.state) == ((), ContextState.DEGRADED)
    assert output == expected


async def test_without_a_disk_a_durable_upload_is_refused_with_what_to_do(memory: Path) -> None:
    async with hosting(memory) as service:
        with pytest.raises(InvalidField, match=r"set spill\.folder"):
            await service.open_context(ContextRequest(context_id="book", durable=True))


async def test_an_append_takes_the_place_of_what_was_there(memory: Path, tmp_path: Path) -> None:
    async with hosting(memory, tmp_path) as service:
        await uploaded(service, BOOK, "int4")
        shorter = await record(service)
        await uploaded(service, MORE)
        longer = await record(service)
        check_books(service, memory)
        give_up(service)
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *MORE, *QUESTION], policy="int4")

    assert longer.host_bytes > shorter.host_bytes > 0
    assert longer.disk_bytes == 0
    assert output == expected


async def test_a_deleted_context_is_zero_and_charged_to_nobody(
    memory: Path, tmp_path: Path
) -> None:
    async with hosting(memory, tmp_path) as service:
        await finished(service, BOOK, "book", durable=True)
        kept = [file.open("rb") for file in in_memory(memory)]
        assert any(any(file.read()) for file in kept)
        await service.delete_context(DEFAULT_TENANT, "book", "")
        for file in kept:
            file.seek(0)
            assert not any(file.read())
            file.close()
        assert in_memory(memory) == files_in(tmp_path) == []
        check_books(service, memory)
        assert num_charged(service) == 0


@pytest.mark.parametrize("is_durable", [False, True])
async def test_what_was_changed_in_the_hosts_memory_is_refused(
    is_durable: bool, memory: Path, tmp_path: Path
) -> None:
    async with hosting(memory, tmp_path) as service:
        await finished(service, BOOK, "book", durable=is_durable)
        await service._stores.wait_idle()
        for file in in_memory(memory):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        give_up(service)
        if not is_durable:
            with pytest.raises(SealedCacheDamaged, match="delete it and upload it again"):
                await generate(service, QUESTION, context="book")
            assert (await record(service)).state is ContextState.DAMAGED
            await service.delete_context(DEFAULT_TENANT, "book", "")
            assert in_memory(memory) == []
            return
        output, usage = await generate(service, QUESTION, context="book")
        whole = await record(service)
        check_books(service, memory)
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert (output, usage.cached_input_tokens) == (expected, 144)
    assert whole.tiers == (Tier.GPU, Tier.HOST, Tier.DISK)


async def test_contexts_go_to_disk_where_the_hosts_memory_is_not_the_ranks(
    memory: Path, tmp_path: Path
) -> None:
    """As with ranks on other machines."""
    async with hosting(memory, tmp_path) as service:
        (home,) = [path for path in memory.iterdir() if path.is_dir()]
        shutil.rmtree(home / "contexts")
        await stored(service, BOOK, "book")
        kept = await record(service)
        give_up(service)
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert (kept.tiers, kept.message) == ((Tier.GPU, Tier.DISK), "")
    assert output == expected


async def test_no_plain_byte_of_a_context_is_in_the_hosts_memory(memory: Path) -> None:
    settings = host_config(memory)
    async with running_engine(served_model("llama"), settings) as (service, executor):
        await stored(service, BOOK, "book")
        planes = [plane for each in executor.runners for plane in each._store.planes(0)]
        canaries = {
            token.numpy().tobytes()
            for plane in planes
            for token in plane.flatten(0, 2)
            if token.count_nonzero()
        }
        content = b"".join(file.read_bytes() for file in memory.rglob("*") if file.is_file())

    assert len(canaries) > len(BOOK)
    assert len(content) > len(BOOK)
    assert not any(canary in content for canary in canaries)
    assert array("I", BOOK).tobytes()[:32] not in content
