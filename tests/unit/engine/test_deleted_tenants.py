"""Nothing of a deleted tenant is left in an engine, and nothing of it is found by a later tenant of
the same id."""

from collections.abc import AsyncIterator

import pytest

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import Finished, FinishReason, TokenChunk
from kvcluster.engine.context_api import ContextRequest
from kvcluster.errors import ContextNotFound, GenerationNotFound
from kvcluster.tenancy.limits import NO_LIMITS, Partitions
from kvcluster.tenancy.shares import TenantShare, TenantShares
from kvcluster.types import GenerationId, TenantId
from tests.fake_engine import FakeCluster, model_spec, packed
from tests.unit.engine.serving import BLUE, Served, serve

RED = TenantId("red")
CANARY = [121, 122, 123, 124] * 5
SUFFIX = [7, 8, 9]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=(), max_context_tokens=200),
        cache=CacheConfig(block_size=4, exact_recent_tokens=8, prefix_cache=True),
        config=EngineConfig(prefill_chunk_tokens=8, shard_min_tokens=16),
    )
    async for made in serve(fake):
        yield made


def share(tenant: TenantId, uid: str) -> TenantShare:
    return TenantShare(tenant=tenant, partitions=Partitions(), tenant_uid=uid)


def shares(revision: int, red: str, *, deleted: str = "") -> TenantShares:
    """Blue is always there. `red`: its uid; empty: it is not there. `deleted`: a red that was."""
    return TenantShares(
        revision=revision,
        shares=(share(BLUE, "uid-blue"), *((share(RED, red),) if red else ())),
        deleted=((RED, deleted),) if deleted else (),
    )


async def fill(served: Served, tenant: TenantId) -> GenerationId:
    """A pinned context, and a generation that has ended."""
    service = served.service
    opened = await service.open_context(
        ContextRequest(tenant=tenant, context_id="book", pinned=True)
    )
    await service.append_context(tenant, "book", opened.upload, TokenChunk(0, packed(CANARY)))
    await service.finish_context(tenant, "book", opened.upload)
    generation = await served.start([*CANARY, *SUFFIX], tenant=tenant)
    await served.output(generation, tenant=tenant)
    return generation


async def num_cached(served: Served, tenant: TenantId) -> int:
    generation = await served.start([*CANARY, *SUFFIX], tenant=tenant)
    finished = (await served.read(generation, tenant=tenant))[-1].event
    assert isinstance(finished, Finished)
    return finished.usage.cached_input_tokens


async def test_a_deleted_tenant_leaves_nothing_on_the_ranks_or_in_the_engine(
    served: Served,
) -> None:
    await served.service.apply_shares(shares(1, "uid-1"))
    ended = await fill(served, RED)
    served.gate.clear()
    running = await served.start([*CANARY, 5, 6], 50, tenant=RED)
    events = served.service.watch(RED, running, 0)
    await anext(events)
    served.gate.set()
    await served.service.apply_shares(shares(2, "", deleted="uid-1"))

    assert not set(CANARY) & served.fake.ring.tokens_on_ranks()
    assert served.fake.partitions.num_used == 0
    assert await served.service.list_contexts(RED) == ()
    assert await served.service.list_generations(RED) == ()
    for generation in (ended, running):
        with pytest.raises(GenerationNotFound):
            await served.service.get(RED, generation)
    # Whoever reads a generation hears of its end.
    last = [event.event async for batch in events for event in batch][-1]
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.CANCELLED


@pytest.mark.parametrize("is_told", [True, False], ids=["deleted-first", "at-once"])
async def test_a_later_tenant_of_the_same_id_finds_nothing_of_the_earlier_one(
    served: Served, *, is_told: bool
) -> None:
    await served.service.apply_shares(shares(1, "uid-1"))
    ended = await fill(served, RED)
    assert await num_cached(served, RED) == 20
    if is_told:
        await served.service.apply_shares(shares(2, "", deleted="uid-1"))
    await served.service.apply_shares(shares(3, "uid-2"))

    with pytest.raises(ContextNotFound):
        await served.service.get_context(RED, "book")
    with pytest.raises(GenerationNotFound):
        await served.service.get(RED, ended)
    assert await served.service.list_cache_entries(RED) == ()
    assert (await served.service.tenant_load(RED, NO_LIMITS)).num_refused == 0
    assert await num_cached(served, RED) == 0


async def test_what_comes_after_a_tenant_was_deleted_goes_with_the_next_push(
    served: Served,
) -> None:
    await served.service.apply_shares(shares(2, "", deleted="uid-1"))
    await fill(served, RED)
    await served.service.apply_shares(shares(2, "", deleted="uid-1"))

    assert await served.service.list_contexts(RED) == ()
    assert served.fake.partitions.num_used == 0


async def test_other_tenants_and_a_tenant_that_was_undeleted_keep_what_they_have(
    served: Served,
) -> None:
    await served.service.apply_shares(shares(1, "uid-1"))
    kept = await fill(served, BLUE)
    await served.service.apply_shares(shares(2, "", deleted="uid-1"))
    await served.service.apply_shares(shares(3, "uid-1"))
    await fill(served, RED)
    # A push that is late says nothing of now.
    await served.service.apply_shares(shares(2, "", deleted="uid-1"))
    await served.service.apply_shares(shares(4, "uid-1"))

    assert await num_cached(served, BLUE) == 20
    assert await num_cached(served, RED) == 20
    assert (await served.service.get(BLUE, kept)).generation == kept
