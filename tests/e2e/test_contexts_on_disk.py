"""Contexts on disk through the real port: a restart on other ranks, and what a client is told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from kvcluster.client import Client
from kvcluster.config import RingConfig, SpillConfig
from kvcluster.engine.api import Output
from kvcluster.engine.context_api import ContextState
from kvcluster.engine.service import EngineService
from kvcluster.errors import InvalidField, QuotaExceeded, SealedCacheDamaged
from kvcluster.model.loader import LoadedModel
from kvcluster.tenancy.limits import Tier
from kvcluster.types import DEFAULT_TENANT
from tests.architectures import VOCAB_SIZE
from tests.distributed.stored_contexts import KEY, files_in, shares
from tests.e2e.conftest import CONFIG
from tests.thread_executor import running_engine
from tests.unit.router.serving import serving

BOOK = [3 + 5 * index % (VOCAB_SIZE - 3) for index in range(150)]
QUESTION = [7, 8, 9]


class Stored(NamedTuple):
    client: Client
    service: EngineService


@asynccontextmanager
async def stored(
    model: LoadedModel, num_ranks: int, folder: Path | None, *, host_bytes: int = 0
) -> AsyncIterator[Stored]:
    """A cluster that is started, and stopped altogether. `host_bytes`: of the host's memory."""
    config = replace(CONFIG, ring=RingConfig(num_ranks=num_ranks))
    spill = SpillConfig(folder=str(folder or ""), host_capacity_bytes=host_bytes)
    config = replace(config, spill=spill)
    async with (
        running_engine(model, config) as (service, _),
        serving(service) as server,
        Client(server.address) as client,
    ):
        yield Stored(client, service)


async def output(client: Client, prompt: list[int], **options: object) -> list[int]:
    events = client.generate(
        prompt_ids=prompt,
        max_output_tokens=8,
        ignore_eos=True,
        cache_mode="bypass",
        **options,  # type: ignore[arg-type]
    )
    return [
        token
        async for event in events
        if isinstance(event.event, Output)
        for token in event.event.token_ids
    ]


async def test_a_context_of_three_ranks_is_read_by_two_after_everything_was_stopped(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    async with stored(tiny_model, 3, tmp_path) as (client, _):
        written = await client.upload_context(
            "book", prompt_ids=BOOK, policy="int4", durable=True, display_name="A book"
        )
        expected = await output(client, [*BOOK, *QUESTION], policy="int4")
    async with stored(tiny_model, 2, tmp_path) as (client, _):
        (listed,) = [record async for record in client.list_contexts()]
        found = await output(client, QUESTION, context="book")
        loaded = await client.get_context("book")
        await client.delete_context("book")

    assert written.tiers == loaded.tiers == (Tier.GPU, Tier.DISK)
    assert (listed.tiers, listed.display_name, listed.uid) == (
        (Tier.DISK,),
        "A book",
        written.uid,
    )
    assert listed.disk_bytes == written.disk_bytes > 0
    assert found == expected
    assert files_in(tmp_path) == []


async def test_a_client_is_told_that_a_context_is_damaged(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    async with stored(tiny_model, 1, tmp_path) as (client, _):
        await client.upload_context("book", prompt_ids=BOOK, durable=True)
    for file in files_in(tmp_path):
        file.write_bytes(file.read_bytes()[:-1])
    async with stored(tiny_model, 1, tmp_path) as (client, _):
        with pytest.raises(SealedCacheDamaged, match="delete it and upload it again"):
            await output(client, QUESTION, context="book")
        record = await client.get_context("book")

    assert record.state is ContextState.DAMAGED


async def test_a_durable_upload_is_refused_where_the_disk_has_no_room_for_it(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    async with stored(tiny_model, 1, tmp_path) as (client, service):
        await service.apply_shares(shares(1, {1: KEY}, disk_limit=1000))
        with pytest.raises(QuotaExceeded, match=r"partitions\.disk") as refused:
            await client.upload_context("book", prompt_ids=BOOK, durable=True)
        record = await client.get_context("book")

    assert refused.value.metadata["quota"] == "partitions.disk.limit_bytes"
    assert refused.value.metadata["limit"] == "1000"
    assert record.tiers == (Tier.GPU,)
    assert record.message.startswith("not on disk")


async def test_without_a_folder_a_durable_upload_says_what_to_set(tiny_model: LoadedModel) -> None:
    async with stored(tiny_model, 1, None) as (client, _):
        with pytest.raises(InvalidField, match=r"spill\.folder"):
            await client.upload_context("book", prompt_ids=BOOK, durable=True)


async def test_a_client_sees_what_is_in_the_hosts_memory(tiny_model: LoadedModel) -> None:
    async with stored(tiny_model, 2, None, host_bytes=1 << 26) as (client, service):
        await client.upload_context("book", prompt_ids=BOOK, policy="int4")
        await service._stores.wait_idle()
        (listed,) = [record async for record in client.list_contexts()]
        service._engine.prefixes.cache(DEFAULT_TENANT).evict(0, 1 << 30)
        given_up = await client.get_context("book")
        found = await output(client, QUESTION, context="book")
        expected = await output(client, [*BOOK, *QUESTION], policy="int4")

    assert listed.tiers == (Tier.GPU, Tier.HOST)
    assert given_up.tiers == (Tier.HOST,)
    assert listed.host_bytes == given_up.host_bytes > 0
    assert listed.disk_bytes == 0
    assert found == expected
