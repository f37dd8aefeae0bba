import pytest

from kvcluster.engine.forecast import MAX_RETRY_S, MIN_RETRY_S
from kvcluster.errors import DeadlineInfeasible
from kvcluster.types import TenantId
from tests.fake_engine import FakeCluster, model_spec, request


def taught() -> FakeCluster:
    """A cluster that has seen ten chunks of 16 tokens, 0.1 s a token whatever the context."""
    fake = FakeCluster(spec=model_spec(eos_token_ids=()), num_blocks=2000)
    fake.submit([1] * 160, 1)
    for _ in range(10):
        assert fake.plan() is not None
        fake.clock.now += 1.6
        fake.answer()
    fake.run()
    return fake


def test_there_is_no_forecast_before_any_step() -> None:
    assert FakeCluster().engine.forecast.first_token_s(request(input_tokens=100)) is None


def test_there_is_no_forecast_for_a_prompt_of_unknown_length() -> None:
    assert taught().engine.forecast.first_token_s(request()) is None


def test_the_first_token_comes_after_the_prompts_that_are_ahead() -> None:
    fake = taught()
    alone_s = fake.engine.forecast.first_token_s(request(input_tokens=100))
    fake.submit([1] * 300)
    behind_s = fake.engine.forecast.first_token_s(request(input_tokens=100))
    urgent_s = fake.engine.forecast.first_token_s(request(input_tokens=100, priority=1))

    # The fit is exact for steps that follow one line; rounding remains.
    assert (alone_s, behind_s, urgent_s) == pytest.approx((10.0, 40.0, 10.0))


def test_retry_advice_stays_within_its_limits() -> None:
    fake = taught()
    assert fake.engine.forecast.retry_after_s() == MIN_RETRY_S

    fake.submit([1] * 5000)
    assert fake.engine.forecast.retry_after_s() == MAX_RETRY_S


def test_a_deadline_before_the_forecast_is_refused_at_submission() -> None:
    fake = taught()
    refused = request(input_tokens=100, deadline_s=9.0)

    with pytest.raises(DeadlineInfeasible, match="expected in 10"):
        fake.engine.submit(refused)


def test_what_other_tenants_wait_for_delays_no_more_than_their_share() -> None:
    """A long prompt of another tenant takes turns with a short one; it does not go ahead."""
    fake = taught()
    fake.submit([1] * 3000, tenant=TenantId("red"))

    short_s = fake.engine.forecast.first_token_s(request(input_tokens=100))
    long_s = fake.engine.forecast.first_token_s(request(input_tokens=6000))

    # 10 s of its own and as much of the other's; 600 s of its own and all of the other's.
    assert (short_s, long_s) == pytest.approx((20.0, 900.0))
