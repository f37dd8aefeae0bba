"""Steps where several tenants are about: how long they are, and when the next one is planned."""

import pytest

from kvcluster.config import EngineConfig
from kvcluster.engine.lanes import Lane
from kvcluster.engine.newcomers import NewcomerWait
from kvcluster.engine.step_cost import Pace, Work
from kvcluster.types import TenantId
from tests.fake_engine import FakeCluster

RED, BLUE = TenantId("red"), TenantId("blue")
STEP_S = 0.1
"""Of every step here."""


def wait(*, lookahead: int = 2, first_token_wait_s: float = 0.2) -> NewcomerWait:
    config = EngineConfig(
        prefill_chunk_tokens=64, lookahead_steps=lookahead, first_token_wait_s=first_token_wait_s
    )
    return NewcomerWait(config, block_size=16)


def learnt() -> Pace:
    """A step takes 0.01 s and 1 s for each 100 of work."""
    pace = Pace()
    for size in (1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0):
        pace.observe(Work(dense=size), 0.01 + 0.01 * size)
    return pace


@pytest.mark.parametrize("lookahead", [2, 3])
def test_what_is_left_of_one_step_and_the_next_are_less_than_the_wait(lookahead: int) -> None:
    bounds = wait(lookahead=lookahead)

    left_s = 7.0 - bounds.plan_from(7.0)

    assert left_s > 0
    assert left_s + bounds.step_s == pytest.approx(0.7 * 0.2)


def test_a_step_that_is_never_planned_ahead_may_take_the_whole_wait() -> None:
    assert wait(lookahead=1).step_s == 0.2


def test_only_where_others_may_come_is_a_step_bounded_by_time() -> None:
    lanes = [Lane(), Lane()]

    assert wait().budget(lanes, learnt(), is_shared=False).seconds == float("inf")
    assert wait().budget(lanes, Pace(), is_shared=True).seconds == float("inf")
    shared = wait().budget(lanes, learnt(), is_shared=True)
    assert shared.seconds == pytest.approx(wait().step_s - learnt().fixed_s)
    assert shared.prompt_tokens == 64


def test_half_of_a_step_is_work_however_much_it_takes_to_have_one() -> None:
    pace = learnt()

    short = wait(first_token_wait_s=1.2 * pace.fixed_s).budget([], pace, is_shared=True)

    assert short.seconds == pace.fixed_s


def cluster(*tenants: TenantId) -> FakeCluster:
    """Each of the tenants has a prompt of many steps, and all steps so far took `STEP_S`."""
    fake = FakeCluster(
        num_ranks=1,
        num_blocks=1024,
        config=EngineConfig(
            prefill_chunk_tokens=16, shard_min_tokens=4096, first_token_wait_s=2 * STEP_S
        ),
    )
    for tenant in tenants:
        fake.submit([1] * 1600, max_output_tokens=1, tenant=tenant)
    for _ in range(12):
        assert fake.plan() is not None
        fake.clock.now += STEP_S
        fake.answer()
        fake.engine.tick()
    return fake


def test_the_next_step_is_planned_shortly_before_the_one_in_flight_is_done() -> None:
    fake = cluster(RED, BLUE)
    begun_at = fake.clock.now
    assert fake.plan() is not None

    early = fake.plan()
    plans_at = fake.engine.next_wakeup()
    fake.clock.now = plans_at
    in_time = fake.plan()

    assert early is None
    assert begun_at + 0.5 * STEP_S < plans_at < begun_at + 0.8 * STEP_S
    assert in_time is not None


def test_who_comes_meanwhile_is_in_it() -> None:
    fake = cluster(RED, BLUE)
    fake.plan()
    assert fake.plan() is None

    fake.submit([2] * 16, max_output_tokens=1, tenant=TenantId("green"))
    fake.clock.now = fake.engine.next_wakeup()
    plan = fake.plan()

    assert plan is not None
    assert len(plan.started) == 1


def test_a_step_that_is_done_early_is_followed_at_once() -> None:
    fake = cluster(RED, BLUE)
    fake.plan()
    assert fake.plan() is None

    fake.clock.now += STEP_S / 10
    fake.answer()

    assert fake.plan() is not None


def test_a_step_that_takes_longer_than_expected_is_not_waited_for() -> None:
    fake = cluster(RED, BLUE)
    fake.plan()
    fake.clock.now += 10 * STEP_S

    assert fake.plan() is not None


def test_a_tenant_that_is_alone_is_planned_for_as_early_as_can_be() -> None:
    fake = cluster(RED)

    assert fake.plan() is not None
    assert fake.plan() is not None


def test_before_anything_is_known_of_steps_they_are_planned_early() -> None:
    fake = FakeCluster(num_ranks=1)
    for tenant in (RED, BLUE):
        fake.submit([1] * 48, tenant=tenant)

    assert fake.plan() is not None
    assert fake.plan() is not None
