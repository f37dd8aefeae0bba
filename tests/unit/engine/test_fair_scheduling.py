"""What tenants get of a cluster that another one floods, in simulated time (block size 16)."""

import msgspec
import pytest

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.step_cost import CostModel
from kvcluster.types import TenantId
from tests.fake_engine import FakeCluster, model_spec
from tests.simulated_time import SimulatedTime

RED, BLUE, GREEN = TenantId("red"), TenantId("blue"), TenantId("green")
LONG, SHORT = 8192, 512
SHORT_S = 0.6
"""Seconds of work in a short prompt."""
WAIT_S = 0.1


def simulated(
    *, num_blocks: int = 2048, lookahead: int = 2, max_running: int = 64
) -> SimulatedTime:
    """A short prompt takes about `SHORT_S` alone, a long one 12 seconds."""
    spec = msgspec.structs.replace(
        model_spec(eos_token_ids=(), max_context_tokens=2 * LONG), dense_flops_per_token=400_000
    )
    fake = FakeCluster(
        spec=spec,
        cache=CacheConfig(block_size=16, exact_recent_tokens=0, prefix_cache=False),
        config=EngineConfig(
            prefill_chunk_tokens=1024,
            shard_min_tokens=1024,
            lookahead_steps=lookahead,
            max_running=max_running,
            first_token_wait_s=WAIT_S,
            retention_s=1e9,
        ),
        num_blocks=num_blocks,
    )
    work = CostModel(spec).prefill(0, SHORT).total
    return SimulatedTime(fake, step_s=0.004, work_per_s=work / SHORT_S)


def flood(time: SimulatedTime, tenant: TenantId, num_tokens: int, *, weight: int = 1) -> None:
    """From now on the tenant always has two requests of this length."""

    def look() -> None:
        unfinished = [
            request for request in time.fake.engine.active_requests if request.spec.tenant == tenant
        ]
        for _ in range(2 - len(unfinished)):
            time.send(tenant, num_tokens, weight=weight)
        time.at(time.now + 0.2, look)

    time.flooding.add(tenant)
    look()


def now_and_then(time: SimulatedTime, tenant: TenantId, *, every_s: float, until: float) -> int:
    count, at = 0, time.now
    while at < until:
        time.at(at, lambda: time.send(tenant, SHORT))
        # Not in step with anything.
        at += every_s * (0.7 + 0.6 * ((count * 0.618) % 1))
        count += 1
    return count


def percentile(waits: list[float], percent: int) -> float:
    return waits[min(len(waits) - 1, len(waits) * percent // 100)]


def test_short_requests_beside_longest_prompts_wait_half_longer_at_most() -> None:
    """p99 of the time to the first token, where the short ones are a quarter of the load."""
    idle, busy = simulated(), simulated()
    flood(busy, RED, LONG)
    for time in (idle, busy):
        # The first one finds steps that were planned when nobody else was about.
        time.send(BLUE, SHORT)
        time.run_until(time.now + 15)
        time.sent = {name: sent for name, sent in time.sent.items() if sent.tenant != BLUE}
        now_and_then(time, BLUE, every_s=2.4, until=time.now + 250)
        time.run_until(time.now + 260)

    alone, beside = idle.waits(BLUE), busy.waits(BLUE)
    assert len(beside) == len(alone) > 100
    assert percentile(beside, 99) <= 1.5 * percentile(alone, 99)
    # The other one is not stopped by that: it has all that is left.
    assert busy.served[RED] > 0.7 * sum(busy.served.values())
    assert len(busy.waits(RED)) > 10


def test_the_first_step_after_an_arrival_has_the_newcomer() -> None:
    time = simulated()
    flood(time, RED, LONG)
    now_and_then(time, BLUE, every_s=3, until=time.now + 20)
    time.run_until(time.now + 30)
    num_plans = len(time.fake.plans)
    known = set(time.fake.ring.sequences)

    time.send(BLUE, SHORT)
    time.run_until(time.now + WAIT_S)

    newcomer = min(set(time.fake.ring.sequences) - known)
    assert newcomer in {part.sequence for part in time.fake.plans[num_plans].sequences}


@pytest.mark.parametrize(("lookahead", "most"), [(1, 1.0), (2, 0.7), (3, 0.7)])
def test_a_newcomer_waits_only_so_long_for_the_steps_of_others(lookahead: int, most: float) -> None:
    """Whenever it comes, however long the prompts are that others send."""
    time = simulated(lookahead=lookahead)
    flood(time, RED, LONG)
    now_and_then(time, BLUE, every_s=3, until=time.now + 20)
    time.run_until(time.now + 25)
    settled = set(time.sent)
    num_sent = now_and_then(time, BLUE, every_s=2.4, until=time.now + 240)
    time.run_until(time.now + 250)

    later = [sent for name, sent in time.sent.items() if name not in settled]
    waits = [sent.others_s for sent in later if sent.tenant == BLUE]
    assert len(waits) == num_sent > 90
    # Some come when a step has just been planned, and some just before one is.
    assert 0.9 * most * WAIT_S < max(waits) <= 1.02 * most * WAIT_S
    assert min(waits) < 0.4 * most * WAIT_S


def test_steps_are_short_where_a_newcomer_may_have_to_wait_for_them() -> None:
    time = simulated()
    flood(time, RED, LONG)
    time.run_until(time.now + 20)
    alone = time.largest_step_s
    now_and_then(time, BLUE, every_s=3, until=time.now + 40)
    time.run_until(time.now + 10)
    time.largest_step_s = 0.0
    time.run_until(time.now + 30)

    assert alone > 1
    # A block of 16 at the end of the longest history is what cannot be cut.
    assert time.largest_step_s <= 1.25 * WAIT_S / 2


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 5)])
def test_tenants_that_flood_the_cluster_get_what_their_weights_say(
    weights: tuple[int, int, int],
) -> None:
    time = simulated(num_blocks=8192)
    for tenant, weight, length in zip(
        (RED, BLUE, GREEN), weights, (LONG, SHORT, LONG // 4), strict=True
    ):
        flood(time, tenant, length, weight=weight)
    time.run_until(time.now + 10)
    before = dict(time.served)
    time.run_until(time.now + 60)

    got = {tenant: time.served[tenant] - before[tenant] for tenant in before}
    for tenant, weight in zip((RED, BLUE, GREEN), weights, strict=True):
        # By work, not by tokens: within a few parts of a step in hundreds.
        assert got[tenant] / sum(got.values()) == pytest.approx(weight / sum(weights), abs=0.02)


def test_short_requests_without_end_do_not_starve_a_long_one() -> None:
    time = simulated()
    for tenant in (BLUE, GREEN):
        flood(time, tenant, SHORT)
    time.run_until(time.now + 10)

    time.send(RED, LONG)
    # At a third of the cluster it takes three times as long as alone.
    time.run_until(time.now + 60)

    assert len(time.waits(RED)) == 1


def test_a_long_request_gets_its_memory_though_small_ones_never_stop_coming() -> None:
    """It needs 9 of 10 blocks of the cluster, and never finds them free by itself."""
    time = simulated(num_blocks=288)
    for tenant in (BLUE, GREEN):
        flood(time, tenant, SHORT)
    time.run_until(time.now + 10)

    time.send(RED, LONG)
    time.run_until(time.now + 120)

    assert len(time.waits(RED)) == 1
    assert min(len(time.waits(BLUE)), len(time.waits(GREEN))) > 20


def test_decodes_of_a_tenant_do_not_hold_up_the_prompt_of_another() -> None:
    """Their generations alone take more time than a step may have."""
    time = simulated()
    for _ in range(60):
        time.send(RED, 64, max_output_tokens=4000)
    time.run_until(time.now + 10)
    flood(time, BLUE, SHORT)
    before = dict(time.served)

    time.run_until(time.now + 15)

    got = time.served[BLUE] - before.get(BLUE, 0.0)
    assert got > 0.4 * (sum(time.served.values()) - sum(before.values()))


def test_the_last_places_are_for_tenants_that_run_nothing() -> None:
    time = simulated(max_running=4)
    for _ in range(12):
        time.send(RED, 64, max_output_tokens=4000)
    time.send(BLUE, 64, max_output_tokens=1)
    time.run_until(time.now + 5)

    assert time.waits(BLUE)
    assert len(time.waits(RED)) == 3
