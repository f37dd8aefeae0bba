"""Contexts in the host's memory: they come back without a disk, make room for others by the
tenants' shares, move to disk as they are sealed, and leave nothing when they go."""

import os
import shutil
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvcluster.config import ClusterConfig, SpillConfig, TenancyConfig
from kvcluster.engine.api import GenerationRequest, TokenChunk
from kvcluster.engine.context_api import ContextRecord, ContextRequest, ContextState
from kvcluster.engine.service import EngineService
from kvcluster.errors import ContextNotFound, InvalidField, RankLost, SealedCacheDamaged
from kvcluster.tenancy.limits import NO_LIMITS, UNLIMITED, Partitions, Tier, TierPartition
from kvcluster.tenancy.shares import TenantShare, TenantShares
from kvcluster.types import DEFAULT_TENANT, TenantId
from tests.distributed.stored_contexts import KEY, files_in, finished, num_charged, stored
from tests.distributed.test_contexts import BOOK, MORE, QUESTION, config, generate, uploaded
from tests.served_model import served_model
from tests.thread_executor import running_engine

MEMORY = Path("/dev/shm")
ROOMY = 64 * 1024 * 1024
RED, BLUE = TenantId("red"), TenantId("blue")

pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="this system has no /dev/shm")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    made = MEMORY / f"test-{os.getpid()}-{tmp_path.name}"
    made.mkdir()
    yield made
    shutil.rmtree(made)


def host_config(
    memory: Path, folder: Path | None = None, *, num_ranks: int = 2, capacity: int = ROOMY
) -> ClusterConfig:
    spill = SpillConfig(
        folder="" if folder is None else str(folder),
        host_folder=str(memory),
        host_capacity_bytes=capacity,
    )
    return replace(config(num_ranks), spill=spill)


@asynccontextmanager
async def hosting(
    memory: Path, folder: Path | None = None, **options: int
) -> AsyncIterator[EngineService]:
    settings = host_config(memory, folder, **options)
    async with running_engine(served_model("llama"), settings) as (service, _):
        yield service


def in_memory(memory: Path) -> list[Path]:
    return [path for path in memory.rglob("*.sealed") if path.is_file()]


def check_books(service: EngineService, memory: Path) -> None:
    """What tenants are charged in the host's memory is what lies there."""
    ledger = service._parts.stores.host.ledger
    ledger.check()
    charged = sum(ledger.use(tenant).used_bytes for tenant in ledger.tenants)
    assert charged == sum(file.stat().st_size for file in in_memory(memory))


def give_up(service: EngineService, tenant: TenantId = DEFAULT_TENANT) -> None:
    """Others have wanted the ranks' memory."""
    service._engine.prefixes.cache(tenant).evict(0, 1 << 30)


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


async def one_context(memory: Path, policy: str = "") -> int:
    """Bytes that a context may take while it is written, of which it is charged nearly all."""
    async with hosting(memory) as service:
        await uploaded(service, BOOK, policy)
        await record(service)
        return service._stores._host.most_bytes(service._contexts.find(DEFAULT_TENANT, "book"))


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


def shares(revision: int, *tenants: TenantShare) -> TenantShares:
    return TenantShares(revision=revision, shares=tenants)


def share(
    tenant: TenantId,
    *,
    floor: int = 0,
    limit: int = UNLIMITED,
    weight: int = 1,
    keys: dict[int, bytes] | None = None,
) -> TenantShare:
    """Of the host's memory."""
    return TenantShare(
        tenant=tenant,
        partitions=Partitions(host=TierPartition(floor_bytes=floor, limit_bytes=limit)),
        weight=weight,
        tenant_uid=f"uid of {tenant}",
        data_keys={1: KEY} if keys is None else keys,
    )


@asynccontextmanager
async def tenanted(
    memory: Path, folder: Path | None, *tenants: TenantShare, **options: int
) -> AsyncIterator[EngineService]:
    settings = host_config(memory, folder, **options)
    settings = replace(settings, tenancy=TenancyConfig(database="unused"))
    async with running_engine(served_model("llama"), settings) as (service, _):
        await service.apply_shares(shares(1, *tenants))
        yield service


async def keep(service: EngineService, tenant: TenantId, name: str) -> None:
    """Upload a context of BOOK's length, and wait until it is where it is kept."""
    ids = [(7 * token + sum(map(ord, tenant + name))) % 50 + 3 for token in BOOK]
    opened = await service.open_context(ContextRequest(tenant=tenant, context_id=name))
    chunk = TokenChunk(0, array("I", ids).tobytes())
    await service.append_context(tenant, name, opened.upload, chunk)
    await service.finish_context(tenant, name, opened.upload)
    await service._stores.wait_idle()


async def on_host(service: EngineService, tenant: TenantId) -> list[str]:
    listed = await service.list_contexts(tenant)
    return [context.context_id for context in listed if Tier.HOST in context.tiers]


async def test_who_borrows_most_for_its_weight_makes_room(memory: Path) -> None:
    size = await one_context(memory)
    async with tenanted(
        memory, None, share(RED, weight=2), share(BLUE), capacity=4 * size
    ) as service:
        for name in ("a", "b"):
            await keep(service, RED, name)
            await keep(service, BLUE, name)
        await keep(service, RED, "c")
        check_books(service, memory)
        after_red = (await on_host(service, RED), await on_host(service, BLUE))
        await keep(service, BLUE, "c")
        check_books(service, memory)
        after_blue = (await on_host(service, RED), await on_host(service, BLUE))

    assert after_red == (["a", "b", "c"], ["b"]), "two of blue are more than three of red"
    assert after_blue == (["a", "b", "c"], ["c"])


async def test_a_floor_is_nobody_elses(memory: Path) -> None:
    size = await one_context(memory)
    async with tenanted(
        memory, None, share(RED, floor=size), share(BLUE), capacity=2 * size
    ) as service:
        await keep(service, BLUE, "a")
        await keep(service, BLUE, "b")
        alone = await on_host(service, BLUE)
        await keep(service, RED, "a")
        await keep(service, BLUE, "c")
        check_books(service, memory)
        beside = (await on_host(service, RED), await on_host(service, BLUE))

    assert alone == ["b"], "red's part is kept free while it is not used"
    assert beside == (["a"], ["c"])


async def test_a_floor_that_is_raised_is_taken_back_from_who_borrows(memory: Path) -> None:
    size = await one_context(memory)
    async with tenanted(memory, None, share(RED), share(BLUE), capacity=2 * size) as service:
        await keep(service, BLUE, "a")
        await keep(service, BLUE, "b")
        # Without one of its contexts, blue would be a few bytes below its floor.
        await service.apply_shares(shares(2, share(RED, floor=size), share(BLUE, floor=size)))
        await keep(service, RED, "a")
        refused = await on_host(service, RED)
        await service.apply_shares(shares(3, share(RED, floor=size), share(BLUE, floor=1000)))
        await keep(service, RED, "b")
        check_books(service, memory)

        assert refused == []
        assert await on_host(service, RED) == ["b"]
        assert await on_host(service, BLUE) == ["b"]


async def test_a_limit_is_never_passed_and_a_lower_one_moves_contexts_away(
    memory: Path, tmp_path: Path
) -> None:
    size = await one_context(memory)
    async with tenanted(memory, tmp_path, share(RED, limit=2 * size)) as service:
        for name in ("a", "b", "c"):
            await keep(service, RED, name)
            load = await service.tenant_load(RED, NO_LIMITS)
            assert 0 < load.tiers["host"].used_bytes <= 2 * size
            assert load.tiers["host"].limit_bytes == 2 * size
        before = await on_host(service, RED)
        await service.apply_shares(shares(2, share(RED, limit=size)))
        contexts = service._contexts.of(RED)
        while (await service.tenant_load(RED, NO_LIMITS)).tiers["host"].used_bytes > size:
            await contexts[1].changed.wait()
        check_books(service, memory)
        after = await on_host(service, RED)
        await service.apply_shares(shares(3, share(RED, limit=100)))
        while contexts[2].host.spill is not None:
            await contexts[2].changed.wait()
        await keep(service, RED, "d")
        listed = await service.list_contexts(RED)

    assert (before, after) == (["b", "c"], ["c"])
    assert [context.tiers for context in listed] == [(Tier.GPU, Tier.DISK)] * 4
    assert {context.message for context in listed} == {""}


async def test_what_has_no_room_and_no_disk_says_so(memory: Path) -> None:
    async with tenanted(memory, None, share(RED, limit=1000)) as service:
        await keep(service, RED, "a")
        (context,) = await service.list_contexts(RED)

    assert context.tiers == (Tier.GPU,)
    assert context.message.startswith("not in the host's memory: partitions.host: 0 of the ten")


@pytest.mark.parametrize("is_deleted", [False, True], ids=["the key", "the tenant"])
async def test_what_an_erased_key_sealed_is_zero_and_gone(is_deleted: bool, memory: Path) -> None:
    async with tenanted(memory, None, share(RED), share(BLUE)) as service:
        await keep(service, RED, "a")
        red = [file.open("rb") for file in in_memory(memory)]
        await keep(service, BLUE, "a")
        erased = shares(2, share(RED, keys={2: KEY[::-1]}), share(BLUE))
        if is_deleted:
            deleted = ((RED, "uid of red"),)
            erased = TenantShares(revision=2, shares=(share(BLUE),), deleted=deleted)
        await service.apply_shares(erased)
        while service._contexts.of(RED):
            await service._contexts.of(RED)[0].changed.wait()
        for file in red:
            assert not any(file.read())
            file.close()
        check_books(service, memory)

        assert service._parts.stores.host.ledger.use(RED).used_bytes == 0
        assert await on_host(service, BLUE) == ["a"]


async def test_another_tenants_name_is_nobodys(memory: Path) -> None:
    async with tenanted(memory, None, share(RED), share(BLUE)) as service:
        await keep(service, RED, "a")
        give_up(service, RED)
        request = GenerationRequest(tenant=BLUE, model="tiny", max_output_tokens=1, context="a")
        with pytest.raises(ContextNotFound):
            await service.open(request)


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
