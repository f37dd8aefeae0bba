import pytest

from kvcluster.engine.estimator import MIN_STEPS, SpeedEstimator
from kvcluster.engine.plan import SequenceStep, StepPlan


def prefill(start: int, num_tokens: int) -> StepPlan:
    part = SequenceStep(1, start, num_tokens, bytes(4 * num_tokens), (), 0, samples=False)
    return StepPlan(epoch=1, step=1, sequences=(part,))


def decode(num_sequences: int) -> StepPlan:
    parts = tuple(
        SequenceStep(sequence, 9, 1, b"", (), 5, samples=True) for sequence in range(num_sequences)
    )
    return StepPlan(epoch=1, step=1, sequences=parts)


def seconds(start: int, end: int) -> float:
    """A machine with 1 ms a token and 10 ns a token of context."""
    return 1e-3 * (end - start) + 1e-8 * (end**2 - start**2) / 2


def test_nothing_is_estimated_from_the_first_steps() -> None:
    estimator = SpeedEstimator()
    for _ in range(MIN_STEPS - 1):
        estimator.observe(prefill(0, 64), 0.1)

    assert estimator.prefill_s(0, 100) is None
    assert estimator.decode_s(10) is None


def test_both_terms_are_learnt_from_chunks_of_a_long_prompt() -> None:
    estimator = SpeedEstimator()
    for chunk in range(40):
        start = 1024 * chunk
        estimator.observe(prefill(start, 1024), seconds(start, start + 1024))

    # The steps follow the formula exactly; what differs is rounding.
    assert estimator.prefill_s(0, 1_000_000) == pytest.approx(seconds(0, 1_000_000), rel=1e-6)
    assert estimator.prefill_s(5000, 6000) == pytest.approx(seconds(5000, 6000), rel=1e-6)


def test_steps_that_are_all_alike_give_a_speed_per_token() -> None:
    estimator = SpeedEstimator()
    for _ in range(10):
        estimator.observe(prefill(0, 64), 0.128)

    # Sums of equal terms: exact up to rounding.
    assert estimator.prefill_s(0, 1000) == pytest.approx(2.0)


def test_no_estimate_is_negative_whatever_the_noise() -> None:
    estimator = SpeedEstimator()
    for chunk in range(20):
        estimator.observe(prefill(64 * chunk, 64), 1.0 if chunk < 3 else 0.01 / (1 + chunk))

    estimate = estimator.prefill_s(0, 1_000_000)
    assert estimate is not None
    assert estimate >= 0


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    estimator = SpeedEstimator()
    for speed in (1e-3, 4e-3):
        for _ in range(100):
            estimator.observe(prefill(0, 100), 100 * speed)

    estimate = estimator.prefill_s(0, 1000)
    # A hundred steps at 0.95 leave 0.6 % of the old speed.
    assert estimate == pytest.approx(4.0, rel=0.01)


def test_decode_speed_comes_from_steps_that_only_decode() -> None:
    estimator = SpeedEstimator()
    for _ in range(5):
        estimator.observe(decode(3), 0.02)
        estimator.observe(prefill(0, 64), 0.5)

    assert estimator.decode_s(100) == pytest.approx(2.0)
    assert estimator.statistics().num_prefill_steps == 5


def test_steps_without_sequences_teach_nothing() -> None:
    estimator = SpeedEstimator()
    estimator.observe(StepPlan(epoch=1, step=1, ended=(1,)), 0.1)

    assert estimator.statistics().num_prefill_steps == 0
    assert estimator.statistics().decode_step_s is None
