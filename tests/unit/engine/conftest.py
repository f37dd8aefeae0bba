"""An engine that serves, for the tests of its `Backend`."""

from collections.abc import AsyncIterator

import pytest

from kvcluster.config import EngineConfig
from tests.fake_engine import (
    CharacterTokenizer,
    FakeCluster,
    model_spec,
)
from tests.unit.engine.serving import Served, serve


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=(), max_context_tokens=200),
        config=EngineConfig(prefill_chunk_tokens=8, shard_min_tokens=16, upload_window_chunks=2),
        tokenizer=CharacterTokenizer(),
    )
    async for made in serve(fake):
        yield made
