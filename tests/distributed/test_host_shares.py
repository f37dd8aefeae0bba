"""Tenants' shares of the host's memory: floors, limits and weights hold, whole contexts make room,
and what a tenant's key sealed goes with the key."""

import asyncio
from array import array
from pathlib import Path

import pytest

from kvcluster.engine.api import GenerationRequest, TokenChunk
from kvcluster.engine.context_api import ContextRequest
from kvcluster.errors import (
    ContextNotFound,
    QuotaExceeded,
)
from kvcluster.tenancy.limits import NO_LIMITS, Tier
from kvcluster.tenancy.shares import TenantShares
from kvcluster.types import TenantId
from tests.distributed.host_contexts import (
    check_books,
    give_up,
    in_memory,
    keep,
    memory,
    needs_memory,
    on_host,
    one_context,
    share,
    shares,
    tenanted,
)
from tests.distributed.stored_contexts import KEY
from tests.distributed.test_contexts import BOOK

RED, BLUE = TenantId("red"), TenantId("blue")

__all__ = ["memory"]

pytestmark = needs_memory


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


@pytest.mark.parametrize("is_erased", [False, True], ids=["deleted", "erased"])
async def test_what_had_no_room_on_disk_goes_without_a_word_of_that(
    is_erased: bool, memory: Path, tmp_path: Path
) -> None:
    async with tenanted(memory, tmp_path, share(RED, disk_limit=1000)) as service:
        opened = await service.open_context(
            ContextRequest(tenant=RED, context_id="a", durable=True)
        )
        chunk = TokenChunk(0, array("I", BOOK).tobytes())
        await service.append_context(RED, "a", opened.upload, chunk)
        with pytest.raises(QuotaExceeded, match=r"partitions\.disk"):
            await service.finish_context(RED, "a", opened.upload)
        kept, context = await on_host(service, RED), service._contexts.find(RED, "a")
        erased = shares(2, share(RED, keys={2: KEY[::-1]}))
        async with service._stores._lock(context):
            ending = asyncio.ensure_future(
                service.apply_shares(erased) if is_erased else service.delete_context(RED, "a", "")
            )
            # Whoever waits for its end hears of its blocks before its files can go.
            while not context.is_zeroed:
                service._driver.wake()
                await context.changed.wait()
        await ending
        while service._contexts.of(RED):
            await context.changed.wait()

        assert kept == ["a"]
        check_books(service, memory)


async def test_another_tenants_name_is_nobodys(memory: Path) -> None:
    async with tenanted(memory, None, share(RED), share(BLUE)) as service:
        await keep(service, RED, "a")
        give_up(service, RED)
        request = GenerationRequest(tenant=BLUE, model="tiny", max_output_tokens=1, context="a")
        with pytest.raises(ContextNotFound):
            await service.open(request)
