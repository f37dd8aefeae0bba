"""Virtual times: what each tenant gets for its weight."""

from hypothesis import given
from hypothesis import strategies as st

from kvcluster.engine.fair_share import FairShares
from kvcluster.types import TenantId

RED, BLUE, GREEN = TenantId("red"), TenantId("blue"), TenantId("green")
TENANTS = (RED, BLUE, GREEN)
WEIGHTS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


def serve(
    shares: FairShares, tenants: tuple[TenantId, ...], parts: list[float]
) -> dict[TenantId, float]:
    """What each of them got, while all have work without end."""
    served = dict.fromkeys(tenants, 0.0)
    for work in parts:
        tenant = shares.next(tenants)
        shares.charge(tenant, work)
        served[tenant] += work
    return served


def weighted(weights: tuple[int, ...], head_start: float = 0.0) -> FairShares:
    shares = FairShares(head_start=head_start)
    for tenant, weight in zip(TENANTS, weights, strict=True):
        shares.note(tenant, weight, now=0.0)
    return shares


@given(weights=WEIGHTS, parts=st.lists(st.floats(1, 100), min_size=1, max_size=200))
def test_who_has_work_gets_its_share_within_one_part_each(
    weights: tuple[int, int, int], parts: list[float]
) -> None:
    served = serve(weighted(weights), TENANTS, parts)

    normed = [served[tenant] / weight for tenant, weight in zip(TENANTS, weights, strict=True)]
    # Start-time fair queueing: the largest part of either, for its weight.
    largest = max(parts)
    for i, one in enumerate(normed):
        for j, other in enumerate(normed):
            assert one - other <= largest / weights[i] + largest / weights[j] + 1e-6


@given(weights=WEIGHTS, idle_for=st.integers(0, 100), head_start=st.floats(0, 50))
def test_time_without_work_is_no_claim_beyond_the_head_start(
    weights: tuple[int, int, int], idle_for: int, head_start: float
) -> None:
    shares = weighted(weights, head_start)
    serve(shares, (RED, BLUE), [1.0] * idle_for)

    served = serve(shares, TENANTS, [1.0] * 300)

    fair = 300 * weights[2] / sum(weights)
    assert served[GREEN] <= fair + head_start + sum(weights) + 1


def test_a_tenant_that_comes_back_is_served_before_one_that_never_stopped() -> None:
    shares = weighted((1, 1, 1))
    serve(shares, (RED,), [10.0] * 50)

    assert shares.next((RED, BLUE)) == BLUE


def test_with_a_head_start_a_short_request_is_served_whole_beside_one_without_end() -> None:
    shares = weighted((1, 1, 1), head_start=30.0)
    serve(shares, (RED,), [10.0] * 50)

    served = []
    for _ in range(4):
        served.append(shares.next((RED, BLUE)))
        shares.charge(served[-1], 10.0)

    assert served == [BLUE, BLUE, BLUE, BLUE]
    assert serve(shares, (RED, BLUE), [10.0] * 100)[RED] >= 500


def test_a_weight_that_is_changed_holds_for_what_comes_after() -> None:
    shares = weighted((1, 1, 1))
    serve(shares, (RED, BLUE), [1.0] * 100)
    shares.note(RED, 3, now=1.0)

    served = serve(shares, (RED, BLUE), [1.0] * 100)

    assert 72 <= served[RED] <= 78


def test_who_was_seen_lately_may_send_something_any_moment() -> None:
    shares = FairShares(head_start=0.0)
    shares.note(RED, 1, now=0.0)
    shares.note(BLUE, 1, now=50.0)

    assert shares.recent(now=55.0) == {RED, BLUE}
    assert shares.recent(now=100.0) == {BLUE}


def test_a_tenant_that_ran_ahead_is_remembered_until_the_others_have_caught_up() -> None:
    shares = weighted((1, 1, 1), head_start=50.0)
    serve(shares, (RED,), [10.0])
    shares.charge(BLUE, 100.0)
    ahead = shares.time(BLUE)

    shares.forget_unseen((), now=1e6)

    assert shares.time(BLUE) == ahead
