"""The statistics against published values, and a leak of 20 us that they find where none was."""

import math
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from kvcluster.audit.channels import interleaved
from kvcluster.audit.statistics import (
    P_THRESHOLD,
    T_THRESHOLD,
    cropped_t,
    difference,
    kolmogorov_tail,
    ks_distance,
    ks_p,
    levelled,
    welch_t,
)

A = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
B = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 30.5, 24.5]


def test_t_is_that_of_the_literature() -> None:
    """Example 1 of the Wikipedia article on Welch's t-test; digits by SciPy 1.16."""
    assert welch_t(A, B) == pytest.approx(-2.8585730003990792, rel=1e-12)
    assert welch_t(B, A) == pytest.approx(2.8585730003990792, rel=1e-12)


def test_the_distance_of_distributions_is_that_of_scipy() -> None:
    ones = [((i * 37) % 101) / 10 for i in range(100)]
    others = [((i * 53) % 97) / 10 + 0.7 for i in range(80)]

    assert ks_distance(A, B) == pytest.approx(0.5333333333333333, rel=1e-12)
    assert ks_distance(ones, others) == pytest.approx(0.07, rel=1e-12)
    assert welch_t(ones, others) == pytest.approx(-0.9109205250721935, rel=1e-12)
    assert ks_distance(A, A) == 0.0
    assert ks_distance([1, 2], [3, 4]) == 1.0


def test_what_slows_both_for_a_while_is_taken_off() -> None:
    """A slow half of the rounds, in which all takes 50 times longer than what they differ by."""
    chance = random.Random(0)
    slow = [2.0 if 100 <= i < 200 else 1.0 for i in range(300)]
    others = [level + chance.gauss(0.0, 0.02) for level in slow]
    ones = [level + 0.02 + chance.gauss(0.0, 0.02) for level in slow]
    same = [level + chance.gauss(0.0, 0.02) for level in slow]

    assert abs(welch_t(ones, others)) < T_THRESHOLD < welch_t(*levelled(ones, others))
    assert abs(welch_t(*levelled(same, others))) < T_THRESHOLD


def test_times_are_less_the_median_of_nine_rounds_of_both() -> None:
    ones, others = levelled([float(i) for i in range(20)], [float(i) for i in range(20)])

    assert ones == others
    assert ones[4:16] == [0.0] * 12
    assert ones[0] == -2.0  # of the rounds 0 to 4
    assert ones[19] == 2.0


@pytest.mark.parametrize(
    ("x", "tail"),
    [
        (0.3, 0.9999906941986655),
        (0.5, 0.9639452436648751),
        (0.8, 0.5441424115741981),
        (0.99, 0.2808738392255489),
        (1.0, 0.26999967167735456),
        (1.2, 0.11224966667072497),
        (1.36, 0.049485876755377876),
        (1.63, 0.009846364888486529),
        (2.0, 0.0006709252557796953),
        (3.0, 3.045995948942526e-08),
    ],
)
def test_the_tail_is_kolmogorovs(x: float, tail: float) -> None:
    """`scipy.special.kolmogorov`; 1.36 and 1.63 are the tables' 5 % and 1 %."""
    assert kolmogorov_tail(x) == pytest.approx(tail, rel=1e-9)


def test_the_tail_ends_where_it_should() -> None:
    assert kolmogorov_tail(0.0) == 1.0
    assert kolmogorov_tail(-1.0) == 1.0
    assert kolmogorov_tail(50.0) == 0.0
    assert kolmogorov_tail(0.9999999) == pytest.approx(kolmogorov_tail(1.0), rel=1e-6)


def test_equal_times_are_no_leak_and_constant_ones_that_differ_are() -> None:
    assert not difference([1.0] * 10, [1.0] * 10).is_leak
    found = difference([1.0] * 50, [2.0] * 50)
    assert found.is_leak
    assert found.t == -math.inf
    assert found.median_s == -1.0


def test_of_1000_comparisons_without_a_leak_none_finds_one() -> None:
    chance = random.Random(1)
    found = [
        difference(
            [chance.lognormvariate(0, 1) for _ in range(60)],
            [chance.lognormvariate(0, 1) for _ in range(60)],
        )
        for _ in range(1000)
    ]

    assert sum(one.is_leak for one in found) == 0
    assert sum(one.ks_p < 0.05 for one in found) == pytest.approx(50, abs=30)


def test_a_leak_is_found_behind_a_long_tail_and_none_without_one() -> None:
    """Of 20 in 600, where three times in ten something takes up to 4000 more."""

    def times(chance: random.Random, leak: float) -> list[float]:
        return [
            600 + leak + chance.gauss(0, 40) + (chance.random() < 0.3) * chance.uniform(0, 4000)
            for _ in range(2000)
        ]

    for seed in range(20):
        chance = random.Random(seed)
        plain, leaky, again = times(chance, 0), times(chance, 20), times(chance, 0)

        assert cropped_t(leaky, plain) > T_THRESHOLD > abs(cropped_t(again, plain))
        assert ks_p(leaky, plain) < P_THRESHOLD < ks_p(again, plain)


def busy(extra_s: float) -> Callable[[], Awaitable[float]]:
    """Work of 60 us and `extra_s`, in time of this process alone: that of others does not count."""

    async def probe() -> float:
        start = time.process_time()
        end = start + 60e-6 + extra_s
        while time.process_time() < end:
            pass
        return time.process_time() - start

    return probe


@pytest.mark.parametrize(("leak_s", "is_found"), [(20e-6, True), (0.0, False)])
async def test_a_leak_of_20_us_is_found_and_none_where_there_is_none(
    leak_s: float, is_found: bool
) -> None:
    probes = {"leaky": busy(leak_s), "plain": busy(0.0)}

    times = await interleaved(probes, 3000, random.Random(2))
    found = difference(times["leaky"], times["plain"])

    assert (abs(found.t) > T_THRESHOLD) == (found.ks_p < P_THRESHOLD) == is_found, found
    if is_found:
        assert found.median_s == pytest.approx(20e-6, abs=10e-6)
