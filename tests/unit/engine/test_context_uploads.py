"""Uploads of contexts that are refused, broken, left or repeated: what was acknowledged is there
once, and nothing else is."""

from collections.abc import AsyncIterator

import pytest

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import TextChunk
from kvcluster.engine.context_api import ContextRequest
from kvcluster.errors import QuotaExceeded
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
        config=EngineConfig(prefill_chunk_tokens=8, shard_min_tokens=16, upload_window_chunks=2),
        tokenizer=CharacterTokenizer(),
    )
    async for made in serve(fake):
        yield made


async def opened(served: Served, **fields: object) -> int:
    request = ContextRequest(context_id="book", **fields)  # type: ignore[arg-type]
    return (await served.service.open_context(request)).upload


async def send(served: Served, upload: int, text: str, offset: int = 0) -> None:
    await served.service.append_context(DEFAULT_TENANT, "book", upload, TextChunk(offset, text))


async def received(served: Served) -> int:
    return (await served.service.get_context(DEFAULT_TENANT, "book")).received_bytes


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
