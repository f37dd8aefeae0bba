"""Uploads of contexts that are refused, broken, left or repeated: what was acknowledged is there
once, and nothing else is."""

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import TextChunk
from kvcluster.engine.context_api import ContextRequest, ContextState
from kvcluster.errors import (
    ContextNotReady,
    InvalidField,
    PromptCorrupt,
    QuotaExceeded,
    UploadStalled,
)
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.types import DEFAULT_TENANT
from tests.fake_engine import CharacterTokenizer, FakeCluster, model_spec
from tests.unit.engine.serving import Served, serve

TEXT = "a long book of many words"
SUFFIX = [7, 8, 9]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=(), max_context_tokens=200),
        cache=CacheConfig(block_size=4, exact_recent_tokens=8, prefix_cache=False),
        config=EngineConfig(
            prefill_chunk_tokens=8, shard_min_tokens=16, upload_window_chunks=2, step_timeout_s=1e6
        ),
        tokenizer=CharacterTokenizer(),
    )
    async for made in serve(fake):
        yield made


async def opened(served: Served, **fields: object) -> int:
    request = ContextRequest(context_id="book", **fields)  # type: ignore[arg-type]
    return (await served.service.open_context(request)).upload


async def send(served: Served, upload: int, text: str, offset: int = 0) -> None:
    await served.service.append_context(DEFAULT_TENANT, "book", upload, TextChunk(offset, text))


async def passes(served: Served, seconds: float) -> None:
    """Time passes, in the engine too."""
    served.fake.clock.now += seconds
    served.fake.engine.tick()
    served.service._wake()
    await asyncio.sleep(0)


async def received(served: Served) -> int:
    return (await served.service.get_context(DEFAULT_TENANT, "book")).received_bytes


async def uploaded(served: Served, text: str) -> None:
    upload = await opened(served)
    await send(served, upload, text)
    await served.service.finish_context(DEFAULT_TENANT, "book", upload)


async def check_holds(served: Served, text: str) -> None:
    generation = await served.start(SUFFIX, context="book")
    expected = served.expected([*map(ord, text), *SUFFIX])
    assert await served.output(generation) == expected


async def test_text_that_was_refused_is_there_once_when_the_upload_goes_on(served: Served) -> None:
    limits = TenantLimits(input_tokens_per_minute=20)
    upload = await opened(served, limits=limits)
    await send(served, upload, TEXT[:12])
    with pytest.raises(QuotaExceeded):
        await send(served, upload, TEXT[12:], offset=12)
    served.fake.clock.now += 60
    upload = await opened(served, limits=limits)
    start = await received(served)
    await send(served, upload, TEXT[start:], offset=start)
    await served.service.finish_context(DEFAULT_TENANT, "book", upload)

    await check_holds(served, TEXT)


async def test_the_end_of_a_text_is_not_lost_when_it_is_refused(served: Served) -> None:
    limits = TenantLimits(input_tokens_per_minute=len(TEXT) - 1)
    upload = await opened(served, limits=limits)
    await send(served, upload, TEXT)
    # The encoder holds the last character back.
    with pytest.raises(QuotaExceeded):
        await served.service.finish_context(DEFAULT_TENANT, "book", upload)
    served.fake.clock.now += 60
    upload = await opened(served, limits=limits)
    await served.service.finish_context(DEFAULT_TENANT, "book", upload)

    await check_holds(served, TEXT)


async def test_an_append_that_broke_leaves_nothing_for_the_next_one_to_follow(
    served: Served,
) -> None:
    await uploaded(served, TEXT)
    broken = await opened(served)
    await send(served, broken, " and half of a second part", offset=len(TEXT))
    assert await received(served) == len(TEXT)
    upload = await opened(served)
    await send(served, upload, ". The end", offset=len(TEXT))
    with pytest.raises(UploadStalled):
        await send(served, broken, "never", offset=len(TEXT) + 26)
    record = await served.service.finish_context(DEFAULT_TENANT, "book", upload)

    assert (record.token_count, record.received_bytes) == (len(TEXT) + 9, len(TEXT) + 9)
    await check_holds(served, TEXT + ". The end")


async def test_an_append_that_could_not_be_computed_is_not_counted_as_there(
    served: Served,
) -> None:
    await uploaded(served, TEXT)
    upload = await opened(served)
    await send(served, upload, " and more", offset=len(TEXT))
    context = served.fake.engine.contexts.find(DEFAULT_TENANT, "book")
    assert context.build is not None
    served.fake.engine.contexts.fail(context.build, QuotaExceeded("no block even alone"))

    assert await received(served) == len(TEXT)
    with pytest.raises(UploadStalled):
        await send(served, upload, "!", offset=len(TEXT) + 9)
    await check_holds(served, TEXT)


async def test_an_append_that_nobody_goes_on_with_holds_neither_place_nor_blocks(
    served: Served,
) -> None:
    limits = TenantLimits(concurrent_generations=1)
    await uploaded(served, TEXT)
    upload = await opened(served, limits=limits)
    await send(served, upload, " and many more words still", offset=len(TEXT))
    assert served.fake.engine._scheduler.running
    served.fake.clock.now += served.fake.config.retention_s + 1
    served.fake.engine.tick()
    served.service._wake()

    # It is the only one that may run.
    generation = await served.start(SUFFIX, context="book", limits=limits)
    expected = served.expected([*map(ord, TEXT), *SUFFIX])
    assert await served.output(generation) == expected
    with pytest.raises(UploadStalled, match="was given up"):
        await send(served, upload, "!", offset=len(TEXT) + 26)
    assert await received(served) == len(TEXT)
    scheduler = served.fake.engine._scheduler
    assert (scheduler.running, scheduler.waiting) == ([], [])
    served.fake.evict_all()
    await served.settled()
    assert served.fake.partition.num_used == 0


async def test_what_the_engine_is_slow_with_is_not_given_up(served: Served) -> None:
    upload = await opened(served)
    served.gate.clear()
    sending = asyncio.create_task(send(served, upload, TEXT))
    await asyncio.sleep(0)
    await passes(served, 3 * served.fake.config.retention_s)
    assert not sending.done()
    served.gate.set()
    await sending

    served.gate.clear()
    finishing = asyncio.create_task(served.service.finish_context(DEFAULT_TENANT, "book", upload))
    await asyncio.sleep(0)
    await passes(served, 3 * served.fake.config.retention_s)
    served.gate.set()

    assert (await finishing).state is ContextState.ACTIVE
    await check_holds(served, TEXT)


async def test_an_upload_that_lost_its_caller_while_it_was_computed_is_finished_again(
    served: Served,
) -> None:
    upload = await opened(served)
    await send(served, upload, TEXT)
    served.gate.clear()
    first = asyncio.create_task(served.service.finish_context(DEFAULT_TENANT, "book", upload))
    await asyncio.sleep(0)
    first.cancel()
    again = await opened(served)
    assert await received(served) == len(TEXT)
    with pytest.raises(ContextNotReady, match="is being computed"):
        await send(served, again, "more", offset=len(TEXT))
    second = asyncio.create_task(served.service.finish_context(DEFAULT_TENANT, "book", again))
    await asyncio.sleep(0)
    served.gate.set()

    assert (await second).token_count == len(TEXT)
    assert (await served.service.finish_context(DEFAULT_TENANT, "book", again)).token_count == len(
        TEXT
    )


async def test_an_upload_that_is_over_never_feeds_a_later_one(served: Served) -> None:
    stale = await opened(served)
    await uploaded(served, TEXT)
    await opened(served)
    with pytest.raises(UploadStalled):
        await send(served, stale, "more", offset=len(TEXT))


async def test_nothing_is_kept_of_an_upload_whose_context_expired(served: Served) -> None:
    upload = await opened(served)
    await send(served, upload, TEXT)
    await passes(served, served.fake.config.retention_s + 1)
    await served.settled()
    gc.collect()

    assert len(served.service._uploads) == 0


async def test_an_upload_that_sent_nothing_does_not_decide_for_the_next_one(
    served: Served,
) -> None:
    empty = await opened(served, display_name="the first", ttl_s=60.0)
    with pytest.raises(InvalidField, match="is empty"):
        await served.service.finish_context(DEFAULT_TENANT, "book", empty)
    with pytest.raises(InvalidField, match="ttl"):
        await opened(served, ttl_s=0.0)
    upload = await opened(served, display_name="the second")
    with pytest.raises(UploadStalled):
        await send(served, empty, TEXT)
    await send(served, upload, TEXT)
    record = await served.service.finish_context(DEFAULT_TENANT, "book", upload)

    assert (record.display_name, record.expire_time_s) == ("the second", None)
    await check_holds(served, TEXT)


async def test_an_upload_to_a_context_that_was_deleted_feeds_none_of_its_name(
    served: Served,
) -> None:
    stale = await opened(served)
    await send(served, stale, TEXT[:5])
    await served.service.delete_context(DEFAULT_TENANT, "book", "")
    await opened(served)
    with pytest.raises(UploadStalled):
        await send(served, stale, TEXT[5:])
    assert await received(served) == 0


async def test_text_for_a_context_that_is_complete_is_told_so(served: Served) -> None:
    await uploaded(served, TEXT)
    upload = await opened(served)
    with pytest.raises(PromptCorrupt, match="is there already, with 25 bytes of text"):
        await send(served, upload, "another")
