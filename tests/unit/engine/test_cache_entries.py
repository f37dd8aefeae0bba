"""What a tenant keeps is listed in entries, and what nobody uses of it is given up when asked."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import TokenChunk
from kvcluster.engine.cache_api import CacheAmount, CacheEntry, CachePurge, CachePurged, Standing
from kvcluster.engine.context_api import ContextRequest
from kvcluster.policy import Menu, Method, PlugPoint
from kvcluster.tenancy.limits import NO_LIMITS
from kvcluster.types import DEFAULT_TENANT, PUBLISHED, TenantId
from tests.fake_engine import FakeCluster, model_spec, packed
from tests.unit.engine.serving import BLUE, Served, serve

PROMPT = [*range(1, 22)]
"""Five whole blocks of four tokens, and one token."""
OTHER = [*range(61, 82)]
BLOCK_BYTES = 4 * 4 * (4 + 4)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=(), max_context_tokens=200),
        cache=CacheConfig(block_size=4, exact_recent_tokens=0),
        config=EngineConfig(prefill_chunk_tokens=8, shard_min_tokens=1000),
        num_ranks=1,
        num_blocks=64,
        menu=Menu((Method(plug_point=PlugPoint.CODEC, name="half", meaning=""),)),
        encoded_per_page={"half": [16]},
    )
    async for made in serve(fake):
        yield made


async def ran(served: Served, prompt: list[int], **fields: object) -> None:
    """One output token, so that just the prompt's whole blocks are kept."""
    generation = await served.start(prompt, 1, **fields)
    tenant = fields.get("tenant", DEFAULT_TENANT)
    assert isinstance(tenant, str)
    await served.output(generation, tenant=TenantId(tenant))
    await served.settled()


async def uploaded(served: Served, tokens: list[int], *, pinned: bool = False) -> None:
    limits = NO_LIMITS
    asked = ContextRequest(tenant=DEFAULT_TENANT, context_id="book", pinned=pinned, limits=limits)
    opened = await served.service.open_context(asked)
    chunk = TokenChunk(0, packed(tokens))
    await served.service.append_context(DEFAULT_TENANT, "book", opened.upload, chunk)
    await served.service.finish_context(DEFAULT_TENANT, "book", opened.upload)


async def listed(served: Served, tenant: TenantId = DEFAULT_TENANT) -> list[CacheEntry]:
    found = await served.service.list_cache_entries(tenant)
    return sorted(found, key=lambda each: (each.start_token, each.cache_namespace))


async def purged(
    served: Served, *entries: str, tenant: TenantId = DEFAULT_TENANT, **fields: object
) -> CachePurged:
    wanted = CachePurge(entries=entries, **fields)  # type: ignore[arg-type]
    return await served.service.purge_cache_entries(tenant, wanted)


def used_bytes(served: Served, tenant: TenantId = DEFAULT_TENANT) -> int:
    return served.fake.partitions.of(tenant).use().used_bytes


async def test_an_entry_tells_what_is_kept_and_nothing_of_its_tokens(served: Served) -> None:
    await ran(served, PROMPT, cache_namespace="ann")
    served.fake.clock.now += 60
    (entry,) = await listed(served)

    assert (entry.model, entry.policy, entry.cache_namespace) == ("fake", "exact", "ann")
    assert (entry.start_token, entry.num_tokens) == (0, 20)
    assert entry.num_bytes == 5 * BLOCK_BYTES == used_bytes(served)
    assert entry.standing is Standing.IDLE
    assert entry.last_use_s == served.fake.clock.unix() - 60
    assert entry.entry.startswith("generation-"), "an id that the engine made up"
    assert (await listed(served))[0].entry == entry.entry


async def test_reading_an_entry_is_a_use_of_it(served: Served) -> None:
    await ran(served, PROMPT)
    served.fake.clock.now += 60
    await ran(served, PROMPT)

    (entry,) = await listed(served)
    assert entry.last_use_s == served.fake.clock.unix()


async def test_equal_prompts_of_two_tenants_have_ids_that_cannot_be_compared(
    served: Served,
) -> None:
    await ran(served, PROMPT)
    await ran(served, PROMPT, tenant=BLUE)

    (own,), (others,) = await listed(served), await listed(served, BLUE)
    assert own.entry != others.entry


async def test_every_kept_block_is_in_one_entry(served: Served) -> None:
    await ran(served, PROMPT)
    await ran(served, [*PROMPT[:8], *OTHER[:13]])
    await ran(served, OTHER, cache_namespace="ann")
    found = await listed(served)

    assert [(each.start_token, each.num_tokens) for each in found] == [
        (0, 8),
        (0, 20),
        (8, 12),
        (8, 12),
    ]
    assert sum(each.num_bytes for each in found) == used_bytes(served)


@pytest.mark.parametrize("policy", ["exact", "half"])
async def test_purge_frees_what_it_says_zeroed_and_leaves_other_tenants_alone(
    served: Served, policy: str
) -> None:
    await ran(served, [*PROMPT, *PROMPT, *PROMPT, *PROMPT, *PROMPT], policy=policy)
    await ran(served, OTHER, tenant=BLUE, policy=policy)
    before, others = used_bytes(served), await listed(served, BLUE)
    (entry,) = await listed(served)
    told = await purged(served)

    assert told == CachePurged(given_up=CacheAmount(1, entry.num_bytes))
    assert used_bytes(served) == 0
    # A page of encoded blocks is counted whole, and its last one may have room.
    assert 0 <= before - entry.num_bytes < (1 if policy == "exact" else 8 * BLOCK_BYTES)
    assert not set(PROMPT) & served.fake.ring.tokens_on_ranks()
    assert set(OTHER[:20]) <= served.fake.ring.tokens_on_ranks()
    assert await listed(served) == []
    assert await listed(served, BLUE) == others


async def test_what_was_purged_is_computed_again(served: Served) -> None:
    await ran(served, PROMPT)
    await purged(served)
    generation = await served.start(PROMPT)

    assert await served.output(generation) == served.expected(PROMPT)
    assert served.fake.finished(generation).usage.cached_input_tokens == 0


async def test_an_entry_goes_with_all_that_follows_it_and_nothing_else(served: Served) -> None:
    await ran(served, PROMPT)
    await ran(served, [*PROMPT[:8], *OTHER[:13]])
    await ran(served, OTHER)
    ends = [each for each in await listed(served) if each.start_token]
    told = await purged(served, ends[0].entry)
    assert told.found == {ends[0].entry}
    assert told.given_up == CacheAmount(1, 3 * BLOCK_BYTES)

    first = (await listed(served))[0]
    told = await purged(served, first.entry)
    assert told.given_up == CacheAmount(1, 5 * BLOCK_BYTES)
    (left,) = await listed(served)
    assert left.num_tokens == 20


async def test_an_id_names_its_block_also_after_entries_have_become_one(served: Served) -> None:
    await ran(served, PROMPT)
    await ran(served, [*PROMPT[:8], *OTHER[:13]])
    first, *ends = await listed(served)
    await purged(served, ends[0].entry)
    (whole,) = await listed(served)
    assert (whole.entry, whole.num_tokens) == (first.entry, 20)

    told = await purged(served, ends[1].entry)
    assert told.given_up == CacheAmount(1, 3 * BLOCK_BYTES)
    (left,) = await listed(served)
    assert (left.entry, left.num_tokens) == (first.entry, 8)


async def test_another_tenants_ids_are_not_found_and_nothing_goes(served: Served) -> None:
    await ran(served, PROMPT)
    await ran(served, PROMPT, tenant=BLUE)
    (foreign,) = await listed(served)

    assert await purged(served, foreign.entry, tenant=BLUE) == CachePurged()
    assert len(await listed(served)) == len(await listed(served, BLUE)) == 1


async def test_only_one_namespace_goes(served: Served) -> None:
    for namespace in ("", "ann", "bob"):
        await ran(served, PROMPT, cache_namespace=namespace)
    told = await purged(served, cache_namespace="ann")
    assert told.given_up == CacheAmount(1, 5 * BLOCK_BYTES)
    assert [each.cache_namespace for each in await listed(served)] == ["", "bob"]

    await purged(served, cache_namespace="")
    assert [each.cache_namespace for each in await listed(served)] == ["bob"]


async def test_validation_says_the_same_and_changes_nothing(served: Served) -> None:
    await ran(served, PROMPT)
    before = await listed(served)
    told = await purged(served, validates_only=True)

    assert await listed(served) == before
    assert await purged(served) == told
    assert told.given_up.num_entries == 1


async def test_what_a_running_generation_reads_stays_and_it_answers_right(served: Served) -> None:
    await ran(served, PROMPT)
    await ran(served, [*PROMPT[:8], *OTHER[:13]])
    served.gate.clear()
    generation = await served.start(PROMPT)
    await asyncio.sleep(0)
    standings = [each.standing for each in await listed(served)]
    assert sorted(standings) == [Standing.IDLE, Standing.IN_USE, Standing.IN_USE]
    purging = asyncio.create_task(purged(served))
    served.gate.set()
    told = await purging

    assert told.given_up == CacheAmount(1, 3 * BLOCK_BYTES)
    assert told.in_use == CacheAmount(2, 5 * BLOCK_BYTES)
    answer = served.expected(PROMPT)
    assert not (set(OTHER) - set(answer)) & served.fake.ring.tokens_on_ranks()
    assert await served.output(generation) == answer


@pytest.mark.parametrize(
    ("pinned", "standing"), [(False, Standing.IN_CONTEXT), (True, Standing.PINNED)]
)
async def test_a_contexts_blocks_stay_until_it_is_deleted(
    served: Served, *, pinned: bool, standing: Standing
) -> None:
    await uploaded(served, PROMPT[:20], pinned=pinned)
    await ran(served, [*OTHER], context="book")
    entries = await listed(served)
    assert [each.standing for each in entries] == [standing, Standing.IDLE]
    told = await purged(served)

    assert told.in_contexts == CacheAmount(1, 5 * BLOCK_BYTES)
    assert told.given_up == CacheAmount(1, 5 * BLOCK_BYTES)
    assert not set(OTHER) & served.fake.ring.tokens_on_ranks()
    await served.service.delete_context(DEFAULT_TENANT, "book", "")
    assert await listed(served) == []


async def test_an_idle_entry_stays_while_what_stays_is_found_through_it(
    served: Served,
) -> None:
    await uploaded(served, PROMPT[:20])
    await ran(served, [*PROMPT[:20], *OTHER])
    cache = served.fake.engine.prefixes.cache(DEFAULT_TENANT)
    cache.let_go(
        [block.key for block in cache.blocks() if block.tokens == packed([1, 2, 3, 4])],
        served.fake.engine.contexts.find(DEFAULT_TENANT, "book").uid,
    )
    told = await purged(served)

    assert told.followed == CacheAmount(1, BLOCK_BYTES)
    assert told.in_contexts == CacheAmount(1, 4 * BLOCK_BYTES)


async def test_published_prefixes_are_in_no_tenants_list(served: Served) -> None:
    asked = ContextRequest(tenant=PUBLISHED, context_id="system", pinned=True)
    opened = await served.service.open_context(asked)
    chunk = TokenChunk(0, packed(PROMPT[:8]))
    await served.service.append_context(PUBLISHED, "system", opened.upload, chunk)
    await served.service.finish_context(PUBLISHED, "system", opened.upload)
    await ran(served, PROMPT, cache_namespace="ann")

    (entry,) = await listed(served)
    assert (entry.start_token, entry.num_tokens, entry.cache_namespace) == (8, 12, "ann")
    await purged(served)
    assert len(await listed(served, PUBLISHED)) == 1


async def test_a_tenant_that_keeps_nothing_has_nothing_to_purge(served: Served) -> None:
    assert await listed(served, BLUE) == []
    assert await purged(served, tenant=BLUE) == CachePurged()


@pytest.mark.parametrize("is_lost", [False, True])
async def test_purge_returns_when_the_ranks_have_answered_or_are_gone(
    served: Served, *, is_lost: bool
) -> None:
    await ran(served, PROMPT)
    served.gate.clear()
    purging = asyncio.create_task(purged(served))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not purging.done()
    if is_lost:
        served.service.lose_ring("a rank is gone")
    else:
        served.gate.set()

    told = await asyncio.wait_for(purging, 5)
    assert told.given_up == CacheAmount(1, 5 * BLOCK_BYTES)
    assert await listed(served) == []
