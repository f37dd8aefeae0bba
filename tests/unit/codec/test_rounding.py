"""Rounding goes the promised way, and sums do not depend on what is beside them."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.codec.rounding import (
    MAX_HALF,
    half_at_least,
    half_at_most,
    pairwise_sum,
    power_of_two_at_least,
)

HALF_RANGE = st.floats(-MAX_HALF, MAX_HALF, width=32)


@given(number=HALF_RANGE)
def test_a_half_at_least_is_not_below_and_within_a_spacing(number: float) -> None:
    above = half_at_least(torch.tensor([number])).item()

    assert 0 <= above - number <= max(abs(number) * 2.0**-10, 2.0**-24)


@given(number=st.floats(-MAX_HALF, MAX_HALF, width=16))
def test_a_half_at_least_of_a_float16_is_itself(number: float) -> None:
    assert half_at_least(torch.tensor([number])).item() == number


@given(number=HALF_RANGE)
def test_a_half_at_most_mirrors_a_half_at_least(number: float) -> None:
    x = torch.tensor([number])

    assert half_at_most(x).item() == -half_at_least(-x).item() <= number


@given(number=st.floats(0, 2.0**127, width=32))
def test_a_power_of_two_is_the_smallest_normal_one_not_below(number: float) -> None:
    power = power_of_two_at_least(torch.tensor([number])).item()

    assert math.frexp(power)[0] == 0.5
    assert power >= number
    assert power == 2.0**-126 or power / 2 < number


@given(length=st.integers(1, 70))
def test_a_pairwise_sum_of_small_integers_is_exact(length: int) -> None:
    x = torch.arange(length, dtype=torch.float32)

    assert pairwise_sum(x).item() == length * (length - 1) / 2


def test_a_pairwise_sum_has_the_same_bits_alone_and_among_others() -> None:
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(0))

    together = pairwise_sum(x)

    assert all(torch.equal(pairwise_sum(row), together[i]) for i, row in enumerate(x))
