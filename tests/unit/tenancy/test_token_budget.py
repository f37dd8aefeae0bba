"""Tokens a minute: never more than the bucket has, and never refused for longer than it says."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcluster.tenancy.limits import UNLIMITED
from kvcluster.tenancy.token_budget import TokenBudget

steps = st.lists(st.tuples(st.integers(0, 150), st.floats(0, 30)), max_size=40)


@settings(deadline=None)
@given(limit=st.integers(1, 100), steps=steps)
def test_what_is_let_through_in_any_minute_is_at_most_twice_the_limit_and_never_more_on_the_whole(
    limit: int, steps: list[tuple[int, float]]
) -> None:
    budget, now, taken = TokenBudget(), 0.0, []
    for tokens, pause in steps:
        now += pause
        if budget.wait_s(tokens, limit, now) == 0:
            budget.use(tokens, limit, now)
            taken.append((now, tokens))

    for start, _ in taken:
        assert sum(count for at, count in taken if start <= at < start + 60) <= 2 * limit
    # A rounding error of the drain is below a thousandth of a token.
    assert sum(count for _, count in taken) <= limit * (1 + now / 60) + 1e-3


@settings(deadline=None)
@given(limit=st.integers(1, 10_000), first=st.integers(0, 10_000), more=st.integers(0, 10_000))
def test_after_the_wait_that_it_says_and_not_before_the_tokens_fit(
    limit: int, first: int, more: int
) -> None:
    budget = TokenBudget()
    budget.use(min(first, limit), limit, 0.0)

    wait_s = budget.wait_s(more, limit, 0.0)

    if more > limit:
        assert wait_s is None
        return
    assert wait_s is not None
    # Seconds of a minute at this limit; far below a token's worth of time.
    assert budget.wait_s(more, limit, wait_s + 1e-6) == 0
    if wait_s > 1e-3:
        assert budget.wait_s(more, limit, wait_s - 1e-3) != 0


def test_what_is_reserved_counts_until_it_is_given_back_and_does_not_drain() -> None:
    budget = TokenBudget()
    budget.reserve(80)

    assert budget.used(100, 1000.0) == 80
    assert budget.wait_s(21, 100, 1000.0) is None
    budget.give_back(80)
    budget.use(30, 100, 1000.0)

    assert budget.used(100, 1000.0) == 30
    assert budget.used(100, 1009.0) == 15
    assert budget.used(100, 1030.0) == 0


def test_without_a_limit_everything_fits() -> None:
    budget = TokenBudget()
    budget.reserve(10**12)
    budget.use(10**12, UNLIMITED, 0.0)

    assert budget.wait_s(10**12, UNLIMITED, 0.0) == 0


def test_of_a_limit_of_nothing_nothing_fits() -> None:
    assert TokenBudget().wait_s(1, 0, 0.0) is None
    assert TokenBudget().wait_s(0, 0, 0.0) == 0
