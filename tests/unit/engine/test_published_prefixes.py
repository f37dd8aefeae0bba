"""What operators publish, every tenant begins with and nobody else holds, evicts or writes."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import CacheMode, Finished
from kvcluster.engine.context_api import ContextRequest, ContextState
from kvcluster.errors import ContextNotFound
from kvcluster.types import DEFAULT_TENANT, PUBLISHED, GenerationId, TenantId
from tests.fake_engine import FakeCluster, model_spec
from tests.unit.engine.serving import BLUE, Served, serve
from tests.unit.engine.test_contexts import uploaded
from tests.unit.engine.test_engine_simulation import CODECS, MENU, STEPS, WINDOWS

RED = TenantId("red")
TOKENS = [position * position % 120 + 1 for position in range(42)]
"""Ten whole blocks of four tokens, and two tokens."""
SUFFIX = [7, 8, 9, 10, 11, 12, 13, 14, 15]
POLICIES = ("exact", "half", "stepped", "half + window:recent=16")


def cluster(
    windows: Sequence[int | None] = (None,),
    *,
    num_blocks: int = 64,
    num_ranks: int = 2,
    first_id: int = 1,
) -> FakeCluster:
    return FakeCluster(
        first_id=first_id,
        spec=model_spec(windows=windows, eos_token_ids=(), max_context_tokens=200),
        cache=CacheConfig(block_size=4, exact_recent_tokens=8),
        config=EngineConfig(prefill_chunk_tokens=16, shard_min_tokens=16),
        menu=MENU,
        num_blocks=num_blocks,
        num_ranks=num_ranks,
        encoded_per_page={name: [count] * len(windows) for name, count in CODECS.items()},
        encoded_steps=STEPS,
    )


@pytest.fixture
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    async for made in serve(cluster(getattr(request, "param", (None,)))):
        yield made


async def publish(served: Served, policy: str = "exact", name: str = "system") -> None:
    await uploaded(served, name, TOKENS, tenant=PUBLISHED, pinned=True, policy=policy)


async def cached(served: Served, generation: GenerationId, tenant: TenantId) -> int:
    finished = (await served.read(generation, tenant=tenant))[-1].event
    assert isinstance(finished, Finished)
    return finished.usage.cached_input_tokens


async def asked(served: Served, tokens: list[int], *, tenant: TenantId, **fields: object) -> int:
    """Run a request, whose answer must be right; returns its cached tokens."""
    generation = await served.start(tokens, tenant=tenant, **fields)
    assert await served.output(generation, tenant=tenant) == served.expected(tokens)
    return await cached(served, generation, tenant)


def used(served: Served, tenant: TenantId) -> int:
    return served.fake.partitions.of(tenant).num_used


@pytest.mark.parametrize("served", [(None,), (None, 6)], indirect=True, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
async def test_every_tenant_begins_with_it(policy: str, served: Served) -> None:
    await publish(served, policy)

    for tenant in (BLUE, RED):
        assert await asked(served, [*TOKENS, *SUFFIX], policy=policy, tenant=tenant) == 40
    served.fake.check_books()


async def test_without_it_tenants_begin_with_nothing_of_each_other(served: Served) -> None:
    assert await asked(served, [*TOKENS, *SUFFIX], tenant=BLUE) == 0
    assert await asked(served, [*TOKENS, *SUFFIX], tenant=RED) == 0


async def test_what_follows_it_is_the_tenants_own(served: Served) -> None:
    await publish(served)
    longer = [*TOKENS, *SUFFIX]
    first = await asked(served, longer, tenant=BLUE)
    again = await asked(served, longer, tenant=BLUE)
    other = await asked(served, longer, tenant=RED)

    assert (first, again, other) == (40, 48, 40)


async def test_its_blocks_are_counted_once_and_as_the_operators(served: Served) -> None:
    await publish(served)
    before = used(served, PUBLISHED)
    await asked(served, [*TOKENS, *SUFFIX], tenant=BLUE)
    of_blue = used(served, BLUE)
    served.fake.evict_all()

    # The suffix's blocks and those of the answer; not the ten of the prefix.
    assert (before, of_blue, used(served, BLUE)) == (10, 3, 0)
    assert used(served, PUBLISHED) == before


async def test_it_is_never_evicted(served: Served) -> None:
    await publish(served)
    for number in range(20):
        await asked(served, [number + 1] * 120, tenant=BLUE)

    assert await asked(served, [*TOKENS, *SUFFIX], tenant=RED) == 40


@pytest.mark.parametrize("field", ["cache_mode", "policy", "context"])
async def test_requests_that_may_not_read_it_compute_everything(field: str, served: Served) -> None:
    await publish(served)
    await uploaded(served, "own", [5] * 8, tenant=RED)
    prompt = [*TOKENS, *SUFFIX]
    value = {"cache_mode": CacheMode.BYPASS, "policy": "half", "context": "own"}[field]
    if field == "context":
        generation = await served.start(prompt, tenant=RED, context=value)
        assert await served.output(generation, tenant=RED) == served.expected([*[5] * 8, *prompt])
        assert await cached(served, generation, RED) == 8
    else:
        assert await asked(served, prompt, tenant=RED, **{field: value}) == 0


async def test_no_tenant_reaches_it_by_name(served: Served) -> None:
    await publish(served)

    for tenant in (DEFAULT_TENANT, BLUE):
        with pytest.raises(ContextNotFound):
            await served.service.get_context(tenant, "system")
        with pytest.raises(ContextNotFound):
            await served.service.delete_context(tenant, "system", "")
        with pytest.raises(ContextNotFound):
            await served.start([1], tenant=tenant, context="system")


@pytest.mark.parametrize("policy", POLICIES)
async def test_it_is_withdrawn_when_nobody_reads_it_any_more(policy: str, served: Served) -> None:
    await publish(served, policy)
    served.gate.clear()
    reading = await served.start([*TOKENS, *SUFFIX], policy=policy, tenant=BLUE)
    while not served.fake.engine._scheduler.running:
        await asyncio.sleep(0)
    withdrawing = asyncio.ensure_future(served.service.delete_context(PUBLISHED, "system", ""))
    await asyncio.sleep(0.01)
    is_waiting = not withdrawing.done()
    served.gate.set()
    assert await served.output(reading, tenant=BLUE) == served.expected([*TOKENS, *SUFFIX])
    await withdrawing

    assert is_waiting
    assert used(served, PUBLISHED) == 0
    assert await asked(served, [*TOKENS, *SUFFIX], policy=policy, tenant=RED) == 0
    served.fake.check_books()
    served.fake.evict_all()
    assert served.fake.partitions.num_used == 0


async def test_what_a_lost_rank_took_is_computed_again_by_the_next_upload(served: Served) -> None:
    await publish(served)
    await served.settled()
    served.service.lose_ring("gone")
    ring = served.fake.ring
    for kept in (ring.sequences, ring._users, ring._contents, ring._tokens):
        kept.clear()
    ring.num_steps, ring.epoch = 0, 2
    served.service.restart(2)
    lost = await served.service.get_context(PUBLISHED, "system")
    again = ContextRequest(tenant=PUBLISHED, context_id="system")
    upload = await served.service.open_context(again)
    found = await served.service.finish_context(PUBLISHED, "system", upload.upload)

    assert (lost.state, found.state) == (ContextState.DEGRADED, ContextState.ACTIVE)
    assert await asked(served, [*TOKENS, *SUFFIX], tenant=RED) == 40


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 42),
            st.lists(st.integers(1, 100), min_size=1, max_size=20),
            st.sampled_from([BLUE, RED]),
            st.sampled_from(POLICIES),
            st.booleans(),
        ),
        min_size=2,
        max_size=10,
    ),
    windows=st.sampled_from(WINDOWS),
    num_blocks=st.integers(60, 120),
    num_ranks=st.integers(1, 3),
)
def test_whatever_is_published_each_request_gets_its_own_tokens(
    requests: list[tuple[int, list[int], TenantId, str, bool]],
    windows: tuple[int | None, ...],
    num_blocks: int,
    num_ranks: int,
) -> None:
    async def play() -> None:
        fake = cluster(windows, num_blocks=num_blocks, num_ranks=num_ranks)
        async for served in serve(fake):
            published: set[str] = set()
            for shared, own, tenant, policy, toggles in requests:
                name = policy.replace(" + window:recent=16", "-windowed")
                if toggles and name in published:
                    published.remove(name)
                    await served.service.delete_context(PUBLISHED, name, "")
                elif toggles:
                    published.add(name)
                    await publish(served, policy, name)
                both = [[*TOKENS[:shared], *own], [*TOKENS[:shared], *own, 3]]
                started = [
                    await served.start(prompt, policy=policy, tenant=tenant) for prompt in both
                ]
                for prompt, generation in zip(both, started, strict=True):
                    assert await served.output(generation, tenant=tenant) == served.expected(prompt)
                fake.check_books()
            for name in published:
                await served.service.delete_context(PUBLISHED, name, "")
        assert fake.num_leaked == 0

    asyncio.run(play())


async def test_a_request_that_has_no_room_beside_it_begins_with_nothing_of_it() -> None:
    """Blocks that a codec keeps exact need encoded ones of the tenant's own."""
    async for served in serve(cluster(num_blocks=40, num_ranks=1)):
        await uploaded(served, "own", TOKENS[:16], tenant=RED)
        for policy, length in (("exact", 12), ("half", 24)):
            await uploaded(
                served, policy, TOKENS[:length], tenant=PUBLISHED, pinned=True, policy=policy
            )
        reading = await served.start([1], tenant=RED, context="own")
        assert await served.output(reading, tenant=RED)

        generation = await served.start([*TOKENS[:24], 1], policy="half", tenant=RED)
        finished = (await served.read(generation, tenant=RED))[-1].event

        assert isinstance(finished, Finished)
        # Everything by itself does not fit either: it is refused, and the ring goes on.
        assert finished.error_kind == "QuotaExceeded"
        served.fake.check_books()
        assert await asked(served, [1, 2, 3], tenant=BLUE) == 0
