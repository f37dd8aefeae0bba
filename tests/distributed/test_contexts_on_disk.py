"""A context that N ranks wrote to disk gives, after a restart on M ranks, the tokens that the whole
prompt gives; what was changed on disk gives none."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kvcluster.engine.context_api import ContextChange, ContextRequest, ContextState
from kvcluster.errors import (
    ClusterOverloaded,
    ConfigError,
    ContextNotFound,
    ContextNotReady,
    InvalidField,
    QuotaExceeded,
    RankLost,
)
from kvcluster.model.loader import LoadedModel
from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits, Tier
from kvcluster.types import DEFAULT_TENANT
from tests.distributed.stored_contexts import (
    files_in,
    finished,
    num_charged,
    on_disk,
    shares,
    stored,
    stored_config,
    storing,
    with_capacity,
)
from tests.distributed.test_contexts import (
    BOOK,
    MORE,
    QUESTION,
    config,
    generate,
    uploaded,
)
from tests.served_model import served_model
from tests.thread_executor import running_engine


@pytest.mark.parametrize(
    ("architecture", "policy", "num_ranks"),
    [
        ("llama", "exact", (3, 2)),
        ("llama", "int4", (3, 2)),
        ("llama", "int4", (1, 4)),
        ("llama", "pooled + int4 + window:recent=64", (2, 3)),
        ("gemma2", "exact", (2, 1)),
        ("gemma2", "int4", (3, 2)),
    ],
)
async def test_a_context_survives_a_restart_on_another_number_of_ranks(
    architecture: str, policy: str, num_ranks: tuple[int, int], tmp_path: Path
) -> None:
    model = served_model(architecture)
    async with storing(tmp_path, num_ranks[0], model) as service:
        before = await uploaded(service, BOOK, policy)
        written = await on_disk(service)
    async with storing(tmp_path, num_ranks[1], model) as service:
        found = await service.get_context(DEFAULT_TENANT, "book")
        output, usage = await generate(service, QUESTION, context="book")
        loaded = await service.get_context(DEFAULT_TENANT, "book")
        await service.delete_context(DEFAULT_TENANT, "book", "")
        expected, _ = await generate(service, [*BOOK, *QUESTION], policy=policy)

    assert written.tiers == loaded.tiers == (Tier.GPU, Tier.DISK)
    assert found.tiers == (Tier.DISK,)
    assert (found.state, found.uid, found.kv_bytes) == (ContextState.ACTIVE, before.uid, 0)
    assert (loaded.attention_error, loaded.token_count) == (before.attention_error, 150)
    assert output == expected
    assert usage.cached_input_tokens == 144


@pytest.mark.parametrize("policy", ["exact", "int4"])
async def test_what_was_given_up_for_others_is_read_from_disk_again(
    policy: str, tmp_path: Path
) -> None:
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK, policy)
        await on_disk(service)
        service._engine.prefixes.cache(DEFAULT_TENANT).evict(0, 1 << 30)
        given_up = await service.get_context(DEFAULT_TENANT, "book")
        output, usage = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION], policy=policy)

    assert given_up.tiers == (Tier.DISK,)
    assert usage.cached_input_tokens == 144
    assert output == expected


async def test_what_is_still_in_memory_is_not_read_again(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK)
        await on_disk(service)
        service._engine.prefixes.cache(DEFAULT_TENANT).evict(0, 3)
        held = service._engine.parts.partitions.num_used
        output, usage = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert 0 < held < 9
    assert usage.cached_input_tokens == 144
    assert output == expected


async def test_an_append_and_a_fork_are_written_too(tmp_path: Path) -> None:
    async with storing(tmp_path, 3) as service:
        await uploaded(service, BOOK, "int4")
        await on_disk(service)
        await service.fork_context(DEFAULT_TENANT, "book", "fork", 100, NO_LIMITS)
        await uploaded(service, MORE)
        await on_disk(service)
    async with storing(tmp_path, 2) as service:
        longer, _ = await generate(service, QUESTION, context="book")
        forked, _ = await generate(service, QUESTION, context="fork")
        expected, _ = await generate(service, [*BOOK, *MORE, *QUESTION], policy="int4")
        expected_fork, _ = await generate(service, [*BOOK[:100], *QUESTION], policy="int4")

    assert longer == expected
    assert forked == expected_fork


async def test_a_context_from_disk_is_continued_as_if_it_had_stayed(tmp_path: Path) -> None:
    async with storing(tmp_path, 3) as service:
        await uploaded(service, BOOK)
        await on_disk(service)
    async with storing(tmp_path, 2) as service:
        record = await uploaded(service, MORE)
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *MORE, *QUESTION])

    assert record.token_count == len(BOOK) + len(MORE)
    assert output == expected


async def test_a_context_shorter_than_a_block_is_on_disk_too(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK[:9])
        await on_disk(service)
    async with storing(tmp_path) as service:
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK[:9], *QUESTION])

    assert output == expected


async def test_a_name_an_expiry_and_a_pin_survive_a_restart(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK)
        await on_disk(service)
        change = ContextChange(display_name="A book", pinned=True, ttl_s=3600)
        before = await service.update_context(
            DEFAULT_TENANT, "book", change, etag="", limits=NO_LIMITS
        )
        charged = num_charged(service)
    async with storing(tmp_path) as service:
        after = await service.get_context(DEFAULT_TENANT, "book")
        assert num_charged(service) == charged

    assert sum(file.stat().st_size for file in files_in(tmp_path)) == charged == after.disk_bytes
    assert (after.display_name, after.pinned) == ("A book", True)
    assert after.expire_time_s == before.expire_time_s


async def test_a_pin_counts_what_is_pinned_on_disk(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await stored(service, BOOK, "one", pinned=True)
        size = (await service.get_context(DEFAULT_TENANT, "one")).kv_bytes
        await stored(service, BOOK[::-1], "two")
    async with storing(tmp_path) as service:
        pin = ContextChange(pinned=True)
        with pytest.raises(QuotaExceeded, match="max_pinned_bytes"):
            await service.update_context(
                DEFAULT_TENANT, "two", pin, etag="", limits=TenantLimits(max_pinned_bytes=2 * size)
            )
        refused = await service.get_context(DEFAULT_TENANT, "two")
        roomy = TenantLimits(max_pinned_bytes=4 * size)
        granted = await service.update_context(DEFAULT_TENANT, "two", pin, etag="", limits=roomy)

    assert (refused.pinned, granted.pinned) == (False, True)


async def test_a_deleted_context_leaves_no_file_and_no_charge(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK)
        record = await on_disk(service)
        charged = num_charged(service)
        on_the_disk = sum(file.stat().st_size for file in files_in(tmp_path))
        await service.delete_context(DEFAULT_TENANT, "book", "")
        left, still_charged = files_in(tmp_path), num_charged(service)
    async with storing(tmp_path) as service:
        with pytest.raises(ContextNotFound):
            await service.get_context(DEFAULT_TENANT, "book")

    assert charged == record.disk_bytes == on_the_disk > 0
    assert (left, still_charged) == ([], 0)


async def test_a_context_deleted_while_it_is_written_is_gone(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK)
        await service.fork_context(DEFAULT_TENANT, "book", "fork", 100, NO_LIMITS)
        await service.delete_context(DEFAULT_TENANT, "fork", "")
        await service.delete_context(DEFAULT_TENANT, "book", "")
        await service._stores.wait_idle()

        assert files_in(tmp_path) == []
        assert num_charged(service) == 0


async def test_a_context_whose_time_is_over_leaves_the_disk(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await stored(service, BOOK, "book")
        (context,) = service._contexts.all()
        soon = ContextChange(ttl_s=0.01)
        await service.update_context(DEFAULT_TENANT, "book", soon, etag="", limits=NO_LIMITS)
        while service._contexts.knows(context):
            await context.changed.wait()

        assert files_in(tmp_path) == []
        assert num_charged(service) == 0


async def test_what_is_beyond_the_limit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        service._tiers.apply(shares(1, None, disk_limit=30_000))
        await uploaded(service, BOOK)
        record = await on_disk(service)
        with pytest.raises(QuotaExceeded, match=r"partitions\.disk: 0 of the tenant's 30000 bytes"):
            await stored(service, BOOK[::-1], "other", durable=True)
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION])

        assert record.tiers == (Tier.GPU,)
        assert record.message.startswith("not on disk: partitions.disk")
        assert files_in(tmp_path) == []
        assert num_charged(service) == 0
    assert output == expected


async def test_a_durable_upload_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        record = await finished(service, BOOK, "book", durable=True)

    assert record.tiers == (Tier.GPU, Tier.DISK)


async def test_without_a_disk_a_durable_upload_is_refused_with_what_to_do() -> None:
    async with running_engine(served_model("llama"), config(1)) as (service, _):
        with pytest.raises(InvalidField, match=r"set spill\.folder"):
            await service.open_context(ContextRequest(context_id="book", durable=True))


async def test_a_context_that_does_not_fit_is_refused_until_there_is_room(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await stored(service, BOOK, "one", pinned=True)
        await stored(service, BOOK[::-1], "two")
    small = with_capacity(stored_config(tmp_path, 1), 208)
    async with running_engine(served_model("llama"), small) as (service, _):
        await generate(service, QUESTION, context="one")
        held = service._engine.parts.partitions.num_used
        with pytest.raises(ClusterOverloaded, match="context two on disk does not fit"):
            await generate(service, QUESTION, context="two")
        assert service._engine.parts.partitions.num_used == held
        await service.delete_context(DEFAULT_TENANT, "one", "")
        output, usage = await generate(service, QUESTION, context="two")
        expected, _ = await generate(service, [*BOOK[::-1], *QUESTION])

    assert (output, usage.cached_input_tokens) == (expected, 144)


async def test_the_limit_of_the_gpu_holds_for_what_is_read_from_disk(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await stored(service, BOOK, "book")
        block_bytes = (await service.get_context(DEFAULT_TENANT, "book")).kv_bytes // 9
    async with storing(tmp_path) as service:
        service._tiers.apply(shares(1, None, gpu_limit=12 * block_bytes))
        await generate(service, QUESTION, context="book")
        service._engine.prefixes.cache(DEFAULT_TENANT).evict(0, 1 << 30)
        service._tiers.apply(shares(2, None, gpu_limit=8 * block_bytes))
        with pytest.raises(QuotaExceeded):
            await generate(service, QUESTION, context="book")
        with pytest.raises(QuotaExceeded, match="end a generation or delete a context"):
            await service._stores.bring(service._contexts.find(DEFAULT_TENANT, "book"))
        assert service._engine.parts.partitions.num_used == 0


async def test_a_folder_that_holds_more_than_is_allowed_is_refused(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK)
        await on_disk(service)

    with pytest.raises(ConfigError, match=r"spill\.capacity_bytes: contexts of"):
        async with storing(tmp_path, capacity_bytes=1000):
            pass


async def test_two_engines_cannot_have_one_folder(tmp_path: Path) -> None:
    async with storing(tmp_path):
        with pytest.raises(ConfigError, match="in use by another engine"):
            async with storing(tmp_path):
                pass


async def test_another_model_does_not_read_it_and_the_right_one_does_later(
    tmp_path: Path,
) -> None:
    model = served_model("llama")
    spec = msgspec.structs.replace(model.spec, weights_digest="other")
    other = LoadedModel(spec=spec, module=model.module, device=model.device)
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK)
        await on_disk(service)
    async with storing(tmp_path, model=other) as service:
        record = await service.get_context(DEFAULT_TENANT, "book")
        with pytest.raises(ContextNotReady, match="computed by model tiny, whose weights"):
            await generate(service, QUESTION, context="book")
    async with storing(tmp_path) as service:
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION])

    assert record.state is ContextState.FAILED
    assert output == expected


async def test_what_is_stored_in_another_form_is_refused_and_read_in_its_own_later(
    tmp_path: Path,
) -> None:
    async with storing(tmp_path) as service:
        await uploaded(service, BOOK, "int4")
        await on_disk(service)
    usual = stored_config(tmp_path)
    other = replace(usual, cache=replace(usual.cache, exact_recent_tokens=48))
    async with running_engine(served_model("llama"), other) as (service, _):
        with pytest.raises(ContextNotReady, match="blocks that are read exact: 2, here 3"):
            await generate(service, QUESTION, context="book")
        assert service._engine.parts.partitions.num_used == 0
    async with storing(tmp_path) as service:
        output, _ = await generate(service, QUESTION, context="book")
        expected, _ = await generate(service, [*BOOK, *QUESTION], policy="int4")

    assert output == expected


async def test_a_lost_ring_reads_its_contexts_from_disk_again(tmp_path: Path) -> None:
    async with running_engine(served_model("llama"), stored_config(tmp_path)) as (
        service,
        executor,
    ):
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

    assert lost.tiers == (Tier.DISK,)
    assert (output, usage.cached_input_tokens) == (expected, 144)


async def test_usage_tells_what_a_tenant_has_on_disk(tmp_path: Path) -> None:
    async with storing(tmp_path) as service:
        service._tiers.apply(shares(1, None, disk_limit=1_000_000))
        await stored(service, BOOK, "book")
        record = await service.get_context(DEFAULT_TENANT, "book")
        load = await service.tenant_load(DEFAULT_TENANT, NO_LIMITS)

    assert load.tiers["disk"].used_bytes == record.disk_bytes > 0
    assert load.tiers["disk"].limit_bytes == 1_000_000
