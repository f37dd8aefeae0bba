"""A tenant's limits in the engine: checked before anything is taken, and refused with numbers."""

import asyncio
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcluster.config import EngineConfig
from kvcluster.engine.api import GenerationRequest, PolicySource, TenantLoad, TierLoad
from kvcluster.errors import (
    ContextTooLong,
    KvClusterError,
    PermissionDenied,
    PolicyUnsupported,
    QuotaExceeded,
)
from kvcluster.policy import Menu, Method, PlugPoint
from kvcluster.policy_bounds import MeasuredRecipe
from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits
from kvcluster.types import GenerationId, TenantId
from tests.fake_engine import FakeCluster, packed, request
from tests.unit.engine.serving import Served

RED, BLUE = TenantId("red"), TenantId("blue")
MENU = Menu(
    (
        Method(plug_point=PlugPoint.CODEC, name="int4", meaning="4 bits"),
        Method(plug_point=PlugPoint.CODEC, name="int8", meaning="8 bits"),
    )
)


def of(tenant: TenantId, max_output_tokens: int = 4, **fields: object) -> GenerationRequest:
    given = {name: fields.pop(name) for name in TenantLimits.__struct_fields__ if name in fields}
    limits = msgspec.structs.replace(NO_LIMITS, **given)
    return request(max_output_tokens, tenant=tenant, limits=limits, **fields)


def refusal(fake: FakeCluster, spec: GenerationRequest) -> dict[str, str]:
    with pytest.raises(QuotaExceeded) as refused:
        fake.engine.submit(spec)
    return refused.value.metadata


def load(fake: FakeCluster, tenant: TenantId, limits: TenantLimits = NO_LIMITS) -> TenantLoad:
    own = [each for each in fake.engine.active_requests if each.spec.tenant == tenant]
    return fake.engine.tenants.load(tenant, limits, own, 0)


def begin(fake: FakeCluster, spec: GenerationRequest, prompt: Iterable[int] = range(1, 9)) -> str:
    generation = fake.engine.submit(spec)
    fake.engine.append_prompt(generation, packed(list(prompt)))
    fake.engine.finish_prompt(generation)
    return generation


def test_a_tenant_runs_no_more_generations_than_it_may_and_the_others_wait_their_turn() -> None:
    fake = FakeCluster()
    for _ in range(3):
        begin(fake, of(RED, concurrent_generations=1, queued_generations=2))
    begin(fake, of(BLUE, concurrent_generations=1))
    seen = set()

    while fake.engine.num_unfinished:
        fake.step()
        running = [r.spec.tenant for r in fake.engine._scheduler.running]
        seen.add((running.count(RED), running.count(BLUE)))

    # Blue ran beside the first of red's, ahead of red's second and third.
    assert max(red for red, _ in seen) == 1
    assert (1, 1) in seen


def test_one_generation_more_than_may_run_and_wait_is_refused_with_used_and_allowed() -> None:
    fake = FakeCluster()
    limits = {"concurrent_generations": 1, "queued_generations": 2}
    for _ in range(3):
        begin(fake, of(RED, **limits))

    assert refusal(fake, of(RED, **limits)) == {
        "quota": "queued_generations",
        "used": "2",
        "limit": "2",
    }
    assert begin(fake, of(BLUE, **limits))
    fake.run()
    assert begin(fake, of(RED, **limits))


@pytest.mark.parametrize(("limit", "used"), [(0, "0"), (1, "1")])
def test_without_a_queue_the_limit_of_running_ones_is_named(limit: int, used: str) -> None:
    fake = FakeCluster()
    limits = {"concurrent_generations": limit, "queued_generations": 0}
    for _ in range(limit):
        begin(fake, of(RED, **limits))

    assert refusal(fake, of(RED, **limits)) == {
        "quota": "concurrent_generations",
        "used": used,
        "limit": str(limit),
    }


def test_a_priority_above_the_tenants_is_refused() -> None:
    fake = FakeCluster()

    assert begin(fake, of(RED, max_priority=5, priority=5))
    assert refusal(fake, of(RED, max_priority=5, priority=6)) == {
        "quota": "max_priority",
        "used": "6",
        "limit": "5",
    }


def test_a_context_longer_than_the_tenants_is_refused_before_and_during_the_upload() -> None:
    fake = FakeCluster()

    with pytest.raises(ContextTooLong) as refused:
        fake.engine.submit(of(RED, max_context_tokens=20, input_tokens=17))
    assert refused.value.metadata == {"limit_tokens": "20", "over_tokens": "1"}
    generation = fake.engine.submit(of(RED, max_context_tokens=20))
    fake.engine.append_prompt(generation, packed(range(1, 17)))
    with pytest.raises(ContextTooLong):
        fake.engine.append_prompt(generation, packed([1]))


def test_declared_prompt_tokens_are_reserved_and_more_than_a_minutes_are_refused() -> None:
    fake = FakeCluster()
    spec = of(RED, input_tokens_per_minute=100, input_tokens=60)
    fake.engine.submit(spec)

    assert load(fake, RED, spec.limits).input_tokens == 60
    assert refusal(fake, spec) == {
        "quota": "input_tokens_per_minute",
        "used": "60",
        "limit": "100",
    }
    never = of(RED, input_tokens_per_minute=100, input_tokens=101)
    with pytest.raises(QuotaExceeded, match="never fit") as refused:
        fake.engine.submit(never)
    assert refused.value.retry_after_s is None


def test_prompt_tokens_drain_with_time_and_the_refusal_says_when_to_try_again() -> None:
    fake = FakeCluster()
    limits = {"input_tokens_per_minute": 60}
    begin(fake, of(RED, **limits), prompt=range(1, 61))
    fake.run()

    with pytest.raises(QuotaExceeded) as refused:
        fake.engine.submit(of(RED, input_tokens=30, **limits))
    assert refused.value.retry_after_s == pytest.approx(30.0)
    fake.clock.now += 30.0
    assert fake.engine.submit(of(RED, input_tokens=30, **limits))


def test_a_prompt_of_unknown_length_is_stopped_where_the_minutes_tokens_end() -> None:
    fake = FakeCluster()
    generation = fake.engine.submit(of(RED, input_tokens_per_minute=10))
    fake.engine.append_prompt(generation, packed(range(1, 11)))

    with pytest.raises(QuotaExceeded):
        fake.engine.append_prompt(generation, packed([1]))
    assert fake.engine.find(generation).request.num_prompt_tokens == 10


def test_output_tokens_are_reserved_until_the_end_and_then_count_as_generated() -> None:
    fake = FakeCluster()
    spec = of(RED, 50, output_tokens_per_minute=60)
    generation = begin(fake, spec)

    assert load(fake, RED, spec.limits).output_tokens == 50
    assert refusal(fake, of(RED, 11, output_tokens_per_minute=60))["used"] == "50"
    fake.engine.cancel(GenerationId(generation))

    assert load(fake, RED, spec.limits).output_tokens == 0
    assert begin(fake, of(RED, 60, output_tokens_per_minute=60))


def test_what_is_generated_counts_against_the_minute() -> None:
    fake = FakeCluster()
    limits = msgspec.structs.replace(NO_LIMITS, output_tokens_per_minute=60)
    begin(fake, of(RED, 5, output_tokens_per_minute=60))
    fake.run()

    assert load(fake, RED, limits).output_tokens == 5
    fake.clock.now += 5.0
    assert load(fake, RED, limits).output_tokens == 0


def test_what_one_tenant_uses_is_not_counted_against_another() -> None:
    fake = FakeCluster()
    limits = {"input_tokens_per_minute": 10, "output_tokens_per_minute": 4}
    begin(fake, of(RED, **limits), prompt=range(1, 11))

    assert refusal(fake, of(RED, **limits))["quota"] == "input_tokens_per_minute"
    assert begin(fake, of(BLUE, **limits), prompt=range(1, 11))


def test_a_changed_limit_holds_from_the_next_request_on() -> None:
    fake = FakeCluster()
    begin(fake, of(RED, output_tokens_per_minute=4))

    assert refusal(fake, of(RED, output_tokens_per_minute=4))
    assert begin(fake, of(RED, output_tokens_per_minute=8))


def test_a_refused_request_takes_nothing() -> None:
    fake = FakeCluster()
    limits = {"input_tokens_per_minute": 100, "output_tokens_per_minute": 1}

    assert refusal(fake, of(RED, 2, input_tokens=50, **limits))

    assert load(fake, RED) == TenantLoad()


def test_the_tenants_default_policy_comes_before_the_settings_and_after_the_requests() -> None:
    fake = FakeCluster(
        menu=MENU, encoded_per_page={"int4": (8,), "int8": (8,)}, tenant_policies={RED: "int8"}
    )

    def chosen(**fields: object) -> tuple[str, PolicySource]:
        found = fake.engine.check(of(RED, **fields))
        return str(found.policy), found.source

    assert chosen(default_policy="int4") == ("int4", PolicySource.TENANT)
    assert chosen() == ("int8", PolicySource.TENANT)
    assert chosen(default_policy="int4", policy="int8") == ("int8", PolicySource.REQUEST)


def test_a_policy_that_is_not_among_the_tenants_is_refused_with_those_that_are() -> None:
    fake = FakeCluster(menu=MENU, encoded_per_page={"int4": (8,), "int8": (8,)})
    allowed = {"allowed_policies": ("int4",)}

    assert str(fake.engine.check(of(RED, policy="int4", **allowed)).policy) == "int4"
    for policy in ("int8", ""):
        with pytest.raises(PermissionDenied) as refused:
            fake.engine.check(of(RED, policy=policy, **allowed))
        assert refused.value.metadata["allowed"] == "int4"


def test_a_bound_is_met_by_a_policy_that_the_tenant_may_use() -> None:
    recipes = [
        MeasuredRecipe(
            policy=name, ratio=ratio, perplexity_increase=0.001, perplexity_error=0.0, recall=1.0
        )
        for name, ratio in (("int4", 4.0), ("int8", 2.0))
    ]
    fake = FakeCluster(
        menu=MENU, encoded_per_page={"int4": (8,), "int8": (8,)}, recipes=tuple(recipes)
    )
    spec = of(RED, policy="auto: ppl<=1%", allowed_policies=("int8",))

    assert str(fake.engine.check(spec).policy) == "int8"
    with pytest.raises(PolicyUnsupported):
        fake.engine.check(msgspec.structs.replace(spec, policy="auto: ratio>=3"))


async def test_the_service_tells_what_a_tenant_uses_and_counts_what_it_was_refused(
    served: Served,
) -> None:
    served.gate.clear()
    limits = msgspec.structs.replace(NO_LIMITS, concurrent_generations=1, queued_generations=0)
    fields = {"tenant": RED, "limits": limits}
    await served.start(list(range(1, 21)), **fields)
    with pytest.raises(QuotaExceeded):
        await served.service.open(request(**fields))
    await served.service.estimate(request(**fields))

    load = await served.service.tenant_load(RED, limits)
    other = await served.service.tenant_load(BLUE, limits)

    assert (load.num_running + load.num_waiting, load.num_refused) == (1, 1)
    assert load.input_tokens > 0
    assert other == TenantLoad(tiers={"gpu": TierLoad()})


async def test_cache_that_a_tenant_holds_is_in_its_load(served: Served) -> None:
    await served.start(list(range(1, 21)), 30, tenant=RED)
    while not (load := await served.service.tenant_load(RED, NO_LIMITS)).kv_bytes:
        served.gate.set()
        await asyncio.sleep(0)

    assert load.kv_bytes % served.fake.cache.block_size == 0


async def test_a_retry_attaches_though_the_limits_were_changed_meanwhile(served: Served) -> None:
    served.gate.clear()
    first = await served.open(request_id="r", tenant=RED)

    narrow = TenantLimits(concurrent_generations=0)
    opened = await served.service.open(request(request_id="r", tenant=RED, limits=narrow))

    assert (opened.generation, opened.is_attached) == (first, True)


steps = st.lists(
    st.tuples(
        st.sampled_from((RED, BLUE)),
        st.integers(1, 30),
        st.integers(1, 8),
        st.booleans(),
        st.floats(0, 20),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(steps=steps, limit=st.integers(1, 60))
def test_whatever_is_asked_no_tenant_gets_more_than_its_limits_and_nothing_stays_reserved(
    steps: list[tuple[TenantId, int, int, bool, float]], limit: int
) -> None:
    fake = FakeCluster(config=EngineConfig(prefill_chunk_tokens=16, shard_min_tokens=16))
    limits = {
        "concurrent_generations": 2,
        "queued_generations": 1,
        "input_tokens_per_minute": limit,
        "output_tokens_per_minute": limit,
    }
    record = msgspec.structs.replace(NO_LIMITS, **limits)
    for tenant, num_prompt, max_output, declares, pause in steps:
        fake.clock.now += pause
        spec = of(tenant, max_output, input_tokens=num_prompt if declares else None, **limits)
        try:
            begin(fake, spec, prompt=[1] * num_prompt)
        except KvClusterError:
            if fake.engine.num_unfinished and not declares:
                # As the intake does when a chunk is refused.
                newest = fake.engine.active_requests[-1]
                if not newest.is_prompt_complete:
                    fake.engine.cancel(newest.generation)
        fake.step()
        for each in (RED, BLUE):
            found = load(fake, each, record)
            assert found.num_running <= 2
            assert found.num_running + found.num_waiting <= 3
            assert max(found.input_tokens, found.output_tokens) <= limit
    fake.run()
    # A little more than a minute: the difference of two such times is rounded.
    fake.clock.now += 60.001

    assert load(fake, RED, record) == load(fake, BLUE, record) == TenantLoad()
    assert not fake.engine.tenants._declared
