"""A context is uploaded once and used many times, and only by its tenant."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import CacheMode, Finished, TextChunk, TokenChunk
from kvcluster.engine.context_api import (
    ContextChange,
    ContextRecord,
    ContextRequest,
    ContextState,
    OpenedContext,
)
from kvcluster.errors import (
    ContextNotFound,
    ContextNotReady,
    ContextTooLong,
    EtagMismatch,
    InvalidField,
    KvClusterError,
    PolicyUnsupported,
    PromptCorrupt,
    QuotaExceeded,
    ResourceExists,
    UploadStalled,
)
from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits
from kvcluster.types import DEFAULT_TENANT, GenerationId
from tests.fake_engine import CharacterTokenizer, FakeCluster, model_spec, packed, sampling
from tests.unit.engine.serving import BLUE, Served, serve
from tests.unit.engine.test_engine_simulation import CODECS, MENU

TOKENS = [position * position % 120 + 1 for position in range(42)]
"""Ten whole blocks of four tokens, and two tokens."""
SUFFIX = [7, 8, 9]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=(), max_context_tokens=200),
        cache=CacheConfig(block_size=4, exact_recent_tokens=8, prefix_cache=False),
        config=EngineConfig(prefill_chunk_tokens=8, shard_min_tokens=16, upload_window_chunks=2),
        tokenizer=CharacterTokenizer(),
        menu=MENU,
        encoded_per_page={name: [count] for name, count in CODECS.items()},
    )
    async for made in serve(fake):
        yield made


async def opened(served: Served, context_id: str = "book", **fields: object) -> OpenedContext:
    request = ContextRequest(context_id=context_id, **fields)  # type: ignore[arg-type]
    return await served.service.open_context(request)


async def sent(
    served: Served, upload: OpenedContext, tokens: list[int], offset: int = 0, size: int = 8
) -> None:
    record = upload.record
    for start in range(0, len(tokens), size):
        chunk = TokenChunk(offset + start, packed(tokens[start : start + size]))
        await served.service.append_context(record.tenant, record.context_id, upload.upload, chunk)


async def uploaded(
    served: Served, context_id: str = "book", tokens: list[int] = TOKENS, **fields: object
) -> ContextRecord:
    upload = await opened(served, context_id, **fields)
    await sent(served, upload, tokens, offset=upload.record.token_count)
    return await served.service.finish_context(upload.record.tenant, context_id, upload.upload)


async def cached(served: Served, generation: GenerationId) -> int:
    finished = (await served.read(generation))[-1].event
    assert isinstance(finished, Finished)
    return finished.usage.cached_input_tokens


def refusal_of(error: KvClusterError) -> tuple[type, str, dict[str, str]]:
    return type(error), error.message, error.metadata


async def test_a_generation_on_a_context_gives_the_tokens_of_the_whole_prompt(
    served: Served,
) -> None:
    record = await uploaded(served)
    num_computed = served.fake.ring.num_steps
    generation = await served.start(SUFFIX, context="book")

    assert await served.output(generation) == served.expected([*TOKENS, *SUFFIX])
    assert await cached(served, generation) == 40
    # The two tokens of the open block, and the suffix, in one step; then the other three tokens.
    steps = [step.num_tokens for plan in served.fake.plans for step in plan.sequences]
    assert served.fake.ring.num_steps - num_computed <= 5, steps
    assert (record.state, record.token_count) == (ContextState.ACTIVE, 42)


@pytest.mark.parametrize("policy", ["exact", "half", "half + window:recent=16"])
async def test_a_context_is_used_again_and_again(served: Served, policy: str) -> None:
    await uploaded(served, policy=policy)
    generations = [await served.start([own, *SUFFIX], context="book") for own in (1, 2, 3)]

    for own, generation in zip((1, 2, 3), generations, strict=True):
        assert await served.output(generation) == served.expected([*TOKENS, own, *SUFFIX])
        assert await cached(served, generation) == 40


async def test_usage_counts_the_context_as_cached_input(served: Served) -> None:
    await uploaded(served)
    generation = await served.start(SUFFIX, context="book")
    finished = (await served.read(generation))[-1].event

    assert isinstance(finished, Finished)
    assert finished.usage.input_tokens == 45


async def test_a_record_tells_what_is_stored(served: Served) -> None:
    exact = await uploaded(served)
    packed_ = await uploaded(served, "packed", policy="half")

    assert exact.kv_bytes == 40 * served.fake.spec.kv_bytes_per_token
    assert exact.compression_ratio == 1
    assert packed_.policy == "half"
    # Of ten blocks the first is exact, and the last two.
    assert packed_.compression_ratio == pytest.approx(10 / (3 + 7 / 2))
    assert exact.ranks == 2


async def test_an_upload_that_broke_goes_on_where_it_was(served: Served) -> None:
    first = await opened(served)
    await sent(served, first, TOKENS[:20])
    record = await served.service.get_context(DEFAULT_TENANT, "book")
    assert (record.state, record.received_tokens, record.token_count) == (
        ContextState.CREATING,
        20,
        0,
    )

    second = await opened(served)
    await sent(served, second, TOKENS[16:], offset=16)
    with pytest.raises(UploadStalled):
        await sent(served, first, TOKENS[20:], offset=20)
    done = await served.service.finish_context(DEFAULT_TENANT, "book", second.upload)

    assert done.token_count == 42
    generation = await served.start(SUFFIX, context="book")
    assert await served.output(generation) == served.expected([*TOKENS, *SUFFIX])


async def test_text_goes_on_where_it_was(served: Served) -> None:
    text = "a long book of many words"
    first = await opened(served)
    await served.service.append_context(DEFAULT_TENANT, "book", 1, TextChunk(0, text[:10]))
    second = await opened(served)
    assert (first.upload, second.record.received_bytes) == (1, 10)
    await served.service.append_context(DEFAULT_TENANT, "book", 2, TextChunk(10, text[10:]))
    await served.service.finish_context(DEFAULT_TENANT, "book", 2)
    generation = await served.start(SUFFIX, context="book")

    expected = served.expected([*map(ord, text), *SUFFIX])
    assert await served.output(generation) == expected


@pytest.mark.parametrize(
    ("offset", "tokens", "message"),
    [
        (21, TOKENS[21:], "but 20 tokens have come: go on there"),
        (12, [1, 1, 1], "are not those that came before"),
    ],
)
async def test_a_gap_or_other_tokens_are_refused(
    served: Served, offset: int, tokens: list[int], message: str
) -> None:
    upload = await opened(served)
    await sent(served, upload, TOKENS[:20])

    with pytest.raises(PromptCorrupt, match=message):
        await sent(served, upload, tokens, offset)


async def test_a_context_that_is_continued_is_read_at_its_old_length_meanwhile(
    served: Served,
) -> None:
    await uploaded(served)
    upload = await opened(served)
    await sent(served, upload, [5, 6, 7, 8, 9, 10], offset=42)
    before = await served.start(SUFFIX, context="book")
    assert await served.output(before) == served.expected([*TOKENS, *SUFFIX])

    record = await served.service.finish_context(DEFAULT_TENANT, "book", upload.upload)
    after = await served.start(SUFFIX, context="book")

    assert record.token_count == 48
    assert await served.output(after) == served.expected([*TOKENS, 5, 6, 7, 8, 9, 10, *SUFFIX])
    assert await cached(served, after) == 48


@pytest.mark.parametrize("policy", ["exact", "half"])
async def test_a_fork_shares_the_blocks_and_goes_its_own_way(served: Served, policy: str) -> None:
    await uploaded(served, policy=policy)
    used = served.fake.partition.num_used
    record = await served.service.fork_context(DEFAULT_TENANT, "book", "copy", 0, NO_LIMITS)
    assert (record.state, record.token_count) == (ContextState.ACTIVE, 42)
    assert served.fake.partition.num_used == used

    await uploaded(served, "copy", [11, 12, 13, 14])
    for context, tokens in (("book", TOKENS), ("copy", [*TOKENS, 11, 12, 13, 14])):
        generation = await served.start(SUFFIX, context=context)
        assert await served.output(generation) == served.expected([*tokens, *SUFFIX])


@pytest.mark.parametrize("policy", ["exact", "half"])
async def test_a_fork_may_keep_the_first_tokens_only(served: Served, policy: str) -> None:
    await uploaded(served, policy=policy)
    record = await served.service.fork_context(DEFAULT_TENANT, "book", "start", 22, NO_LIMITS)
    generation = await served.start(SUFFIX, context="start")

    assert record.token_count == 22
    assert await served.output(generation) == served.expected([*TOKENS[:22], *SUFFIX])
    with pytest.raises(ResourceExists):
        await served.service.fork_context(DEFAULT_TENANT, "book", "start", 0, NO_LIMITS)
    with pytest.raises(InvalidField, match="prefix_tokens"):
        await served.service.fork_context(DEFAULT_TENANT, "book", "more", 43, NO_LIMITS)


async def test_delete_returns_when_the_ranks_hold_nothing_of_it(served: Served) -> None:
    canary = [121, 122, 123, 124] * 5
    await uploaded(served, tokens=canary)
    assert {121, 122} <= served.fake.ring.tokens_on_ranks()
    await served.service.delete_context(DEFAULT_TENANT, "book", "")

    assert not {121, 122, 123, 124} & served.fake.ring.tokens_on_ranks()
    assert len(served.fake.ring.zeroed) >= 5
    assert served.fake.partitions.num_used == 0
    with pytest.raises(ContextNotFound):
        await served.service.get_context(DEFAULT_TENANT, "book")


async def test_delete_takes_what_generations_kept_after_the_context(served: Served) -> None:
    served.fake.engine._scheduler.prefixes.is_on = True
    await uploaded(served)
    generation = await served.start([111, 112, 113, 114, 115, 116, 117], context="book")
    await served.output(generation)
    assert 113 in served.fake.ring.tokens_on_ranks()
    await served.service.delete_context(DEFAULT_TENANT, "book", "")

    assert served.fake.partitions.num_used == 0
    assert 113 not in served.fake.ring.tokens_on_ranks()


async def test_delete_leaves_a_fork_whole_and_waits_for_running_generations(
    served: Served,
) -> None:
    await uploaded(served, tokens=[*TOKENS[:20], 99, 98, 97, 96])
    await served.service.fork_context(DEFAULT_TENANT, "book", "fork", 20, NO_LIMITS)
    served.gate.clear()
    generation = await served.start(SUFFIX, 8, context="book")
    await asyncio.sleep(0)
    deleting = asyncio.create_task(served.service.delete_context(DEFAULT_TENANT, "book", ""))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not deleting.done()
    state = (await served.service.get_context(DEFAULT_TENANT, "book")).state
    assert state is ContextState.DELETING
    served.gate.set()
    await deleting

    whole = [*TOKENS[:20], 99, 98, 97, 96, *SUFFIX]
    assert await served.output(generation) == served.expected(whole, 8)
    fork = await served.start(SUFFIX, context="fork")
    assert await served.output(fork) == served.expected([*TOKENS[:20], *SUFFIX])
    assert await cached(served, fork) == 20


async def test_another_tenants_context_is_as_one_that_is_not_there(served: Served) -> None:
    await uploaded(served)
    service = served.service
    chunk = TokenChunk(42, packed([1]))
    calls = [
        lambda name: service.get_context(BLUE, name),
        lambda name: service.delete_context(BLUE, name, ""),
        lambda name: service.append_context(BLUE, name, 1, chunk),
        lambda name: service.finish_context(BLUE, name, 1),
        lambda name: service.fork_context(BLUE, name, "own", 0, NO_LIMITS),
        lambda name: service.update_context(
            BLUE, name, ContextChange(pinned=True), etag="", limits=NO_LIMITS
        ),
        lambda name: served.open(context=name, tenant=BLUE),
    ]
    for call in calls:
        refusals = []
        for name in ("book", "nothing"):
            with pytest.raises(ContextNotFound) as caught:
                await call(name)
            refusals.append(refusal_of(caught.value))
        assert refusals[0] == refusals[1]
    assert await service.list_contexts(BLUE) == ()
    assert [record.context_id for record in await service.list_contexts(DEFAULT_TENANT)] == ["book"]


async def test_two_tenants_use_the_same_id_and_share_no_block(served: Served) -> None:
    await uploaded(served)
    used = served.fake.partitions.num_used
    await uploaded(served, tenant=BLUE)

    assert served.fake.partitions.num_used == 2 * used
    await served.service.delete_context(BLUE, "book", "")
    generation = await served.start(SUFFIX, context="book")
    assert await cached(served, generation) == 40


async def test_a_context_expires(served: Served) -> None:
    record = await uploaded(served, ttl_s=60.0)
    assert record.expire_time_s == pytest.approx(served.fake.clock.unix() + 60)
    changed = await served.service.update_context(
        DEFAULT_TENANT, "book", ContextChange(ttl_s=100.0), etag=record.etag, limits=NO_LIMITS
    )
    assert changed.etag != record.etag
    served.fake.clock.now += 99
    served.fake.engine.tick()
    assert (await served.service.get_context(DEFAULT_TENANT, "book")).token_count == 42
    served.fake.clock.now += 2
    served.fake.engine.tick()
    served.service._wake()
    await served.settled()

    with pytest.raises(ContextNotFound):
        await served.open(context="book")
    assert served.fake.partitions.num_used == 0


async def test_an_upload_that_nobody_goes_on_with_is_given_up(served: Served) -> None:
    upload = await opened(served)
    await sent(served, upload, TOKENS[:20])
    served.fake.clock.now += served.fake.config.retention_s + 1
    served.fake.engine.tick()
    served.service._wake()
    await served.settled()

    with pytest.raises(ContextNotFound):
        await served.service.get_context(DEFAULT_TENANT, "book")


async def test_an_update_with_an_old_etag_changes_nothing(served: Served) -> None:
    record = await uploaded(served, display_name="A book")
    change = ContextChange(display_name="Another")
    await served.service.update_context(
        DEFAULT_TENANT, "book", change, etag=record.etag, limits=NO_LIMITS
    )
    with pytest.raises(EtagMismatch):
        await served.service.update_context(
            DEFAULT_TENANT,
            "book",
            ContextChange(display_name="A third"),
            etag=record.etag,
            limits=NO_LIMITS,
        )
    with pytest.raises(EtagMismatch):
        await served.service.delete_context(DEFAULT_TENANT, "book", record.etag)

    assert (await served.service.get_context(DEFAULT_TENANT, "book")).display_name == "Another"


async def test_pinned_bytes_are_limited(served: Served) -> None:
    size = 42 * served.fake.spec.kv_bytes_per_token
    limits = TenantLimits(max_pinned_bytes=size + 100, max_priority=100)
    await uploaded(served, pinned=True, limits=limits)

    with pytest.raises(QuotaExceeded, match="max_pinned_bytes"):
        await opened(served, "second", pinned=True, limits=limits, total_tokens=20)
    await uploaded(served, "second", TOKENS[:20], limits=limits)
    with pytest.raises(QuotaExceeded, match="max_pinned_bytes"):
        await served.service.update_context(
            DEFAULT_TENANT, "second", ContextChange(pinned=True), etag="", limits=limits
        )


async def test_the_longest_context_is_limited(served: Served) -> None:
    limits = TenantLimits(max_context_tokens=30)
    with pytest.raises(ContextTooLong):
        await opened(served, limits=limits, total_tokens=31)
    upload = await opened(served, limits=limits)
    with pytest.raises(ContextTooLong):
        await sent(served, upload, TOKENS)
    await uploaded(served, "short", TOKENS[:28])
    with pytest.raises(ContextTooLong):
        await served.open(4, context="short", limits=limits)


async def test_unpinned_contexts_give_way_and_are_computed_again(served: Served) -> None:
    await uploaded(served, "loose")
    await uploaded(served, "pinned", [*reversed(TOKENS)], pinned=True)
    served.fake.evict_all()
    records = {
        record.context_id: record for record in await served.service.list_contexts(DEFAULT_TENANT)
    }
    assert records["loose"].state is ContextState.DEGRADED
    assert records["pinned"].state is ContextState.ACTIVE

    generation = await served.start(SUFFIX, context="loose")
    assert await served.output(generation) == served.expected([*TOKENS, *SUFFIX])
    assert await cached(served, generation) == 0
    record = await served.service.get_context(DEFAULT_TENANT, "loose")
    assert record.state is ContextState.ACTIVE
    again = await served.start(SUFFIX, context="loose")
    assert await cached(served, again) == 40


async def test_a_lost_ring_leaves_the_tokens_of_a_context(served: Served) -> None:
    await uploaded(served)
    upload = await opened(served, "half-way")
    await sent(served, upload, TOKENS[:20])
    await served.settled()
    served.service.lose_ring("gone")
    served.fake.ring.sequences.clear()
    served.fake.ring._users.clear()
    served.fake.ring._contents.clear()
    served.fake.ring._tokens.clear()
    served.fake.ring.num_steps, served.fake.ring.epoch = 0, 2
    served.service.restart(2)
    record = await served.service.get_context(DEFAULT_TENANT, "book")
    assert record.state is ContextState.DEGRADED

    generation = await served.start(SUFFIX, context="book")
    assert await served.output(generation) == served.expected([*TOKENS, *SUFFIX])
    await sent(served, upload, TOKENS[20:], offset=20)
    done = await served.service.finish_context(DEFAULT_TENANT, "half-way", upload.upload)
    assert done.state is ContextState.ACTIVE


async def test_a_context_that_is_not_ready_cannot_be_read(served: Served) -> None:
    await opened(served)
    with pytest.raises(ContextNotReady, match="creating"):
        await served.open(context="book")


async def test_what_a_generation_on_a_context_cannot_ask_for_is_refused(served: Served) -> None:
    await uploaded(served)
    with pytest.raises(InvalidField, match="stored with exact"):
        await served.open(context="book", policy="half")
    with pytest.raises(InvalidField, match="no scores"):
        await served.open(context="book", sampling=sampling(prompt_logprobs=1))
    empty = await served.open(context="book")
    with pytest.raises(InvalidField, match="is empty"):
        await served.service.finish_prompt(empty, 0)


async def test_a_policy_that_knows_more_than_blocks_stores_no_context(served: Served) -> None:
    with pytest.raises(PolicyUnsupported, match="cannot store a context"):
        await opened(served, policy="snap:budget=0.5,epoch=8,queries=1")


@pytest.mark.parametrize(
    "fields", [{"cache_mode": CacheMode.BYPASS}, {"cache_namespace": "someone"}]
)
async def test_a_generation_that_shares_nothing_reads_its_context_and_leaves_nothing(
    served: Served, fields: dict[str, object]
) -> None:
    await uploaded(served)
    used = served.fake.partition.num_used
    generation = await served.start([*SUFFIX] * 3, context="book", **fields)

    assert await served.output(generation) == served.expected([*TOKENS, *SUFFIX * 3])
    assert await cached(served, generation) == 40
    await served.settled()
    assert served.fake.partition.num_used == used


async def test_a_context_shorter_than_a_block_holds_no_block(served: Served) -> None:
    record = await uploaded(served, tokens=[1, 2, 3])
    assert (record.state, record.kv_bytes) == (ContextState.ACTIVE, 0)
    generation = await served.start(SUFFIX, context="book")

    assert await served.output(generation) == served.expected([1, 2, 3, *SUFFIX])
    await served.service.delete_context(DEFAULT_TENANT, "book", "")
