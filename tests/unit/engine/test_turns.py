"""Who may start in one plan."""

from kvcluster.engine.request import Request
from kvcluster.engine.turns import Turns
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.types import GenerationId, Policy, SequenceId, TenantId
from tests.fake_engine import request

RED, BLUE, GREEN = TenantId("red"), TenantId("blue"), TenantId("green")


def of(tenant: TenantId, number: int = 1) -> Request:
    limits = TenantLimits(concurrent_generations=2)
    spec = request(tenant=tenant, limits=limits)
    return Request(GenerationId(f"{tenant}-{number}"), spec, Policy(), number)


def test_a_tenant_runs_no_more_than_it_may() -> None:
    turns = Turns([of(RED)], max_running=9)

    assert turns.are_left(of(RED, 2))
    turns.take(of(RED, 2))
    assert not turns.are_left(of(RED, 3))
    assert turns.are_left(of(BLUE))


def test_the_last_place_is_for_a_tenant_that_runs_nothing() -> None:
    turns = Turns([of(RED, 1), of(RED, 2)], max_running=3, tenants=[RED, BLUE])

    assert not turns.has_place(RED)
    assert turns.has_place(BLUE)


def test_alone_a_tenant_has_all_places() -> None:
    assert Turns([of(RED, 1), of(RED, 2)], max_running=3, tenants=[RED]).has_place(RED)


def test_no_more_than_half_of_the_places_are_kept_for_others() -> None:
    others = [TenantId(f"tenant-{index}") for index in range(50)]

    assert Turns([of(RED)], max_running=4, tenants=[RED, *others]).has_place(RED)
    assert not Turns([of(RED), of(RED, 2)], max_running=4, tenants=[RED, *others]).has_place(RED)


def test_nobody_borrows_ahead_of_one_that_waits_for_memory_and_would_finish_sooner() -> None:
    turns = Turns([], max_running=4)
    turns.note_blocked(5.0)
    turns.note_blocked(9.0)

    assert turns.may_borrow(4.0)
    assert not turns.may_borrow(6.0)


def test_nobody_borrows_while_a_running_request_is_short_of_memory() -> None:
    turns = Turns([], max_running=4)
    running = of(RED)
    running.start(SequenceId(1))
    turns.note_short(running)

    assert (turns.is_short(RED), turns.is_short(GREEN)) == (True, False)
    assert not turns.may_borrow(0.0)


def test_what_came_free_for_a_request_that_left_is_anyones() -> None:
    turns = Turns([], max_running=4)
    preempted = of(RED)
    turns.note_short(preempted)

    assert turns.may_borrow(0.0)
