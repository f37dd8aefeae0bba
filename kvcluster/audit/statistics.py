"""Do two sets of times differ? Welch's t over cropped times, and Kolmogorov-Smirnov over all.

Small exact formulas instead of a dependency; the tests compare them with published values. Times of
a network have a long tail that hides small differences, and how long it is depends on what else the
machines do. So t is taken over the fastest part of both, cropped at several places, and the largest
counts (Reparaz, Balasch, Verbauwhede, "Dude, is my code constant time?", DATE 2017, section III).
"""

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

T_THRESHOLD = 4.5
"""|t| of a leak: by chance less than once in 100,000 comparisons (ISO/IEC 17825), and with the
largest of all crops less than once in 20,000 (Bonferroni; they are far from independent)."""
P_THRESHOLD = 1e-4
"""Likewise for Kolmogorov-Smirnov."""
CROPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the times, from the fastest, that t is taken over."""
_MIN_SAMPLES = 8
_AROUND = 4
"""Rounds before one, and as many after it, that tell how fast the machine was."""


class Difference(NamedTuple):
    """How two sets of times differ."""

    t: float
    """Of the crop in which it is largest; positive: the first are longer."""
    ks_p: float
    """How likely such a distance of the distributions is if they are one."""
    median_s: float
    """Of the first less that of the second."""
    num_samples: int
    """Of the smaller set."""

    @property
    def is_leak(self) -> bool:
        return abs(self.t) >= T_THRESHOLD or self.ks_p <= P_THRESHOLD


def difference(ones: Sequence[float], others: Sequence[float]) -> Difference:
    """Compare times in seconds; at least 8 of each."""
    assert min(len(ones), len(others)) >= _MIN_SAMPLES
    return Difference(
        t=cropped_t(ones, others),
        ks_p=ks_p(ones, others),
        median_s=_median(ones) - _median(others),
        num_samples=min(len(ones), len(others)),
    )


def levelled(ones: Sequence[float], others: Sequence[float]) -> tuple[list[float], list[float]]:
    """Times of as many rounds, in their order, each less the median of both sets in the rounds
    around it: what slows a machine for a while slows both, and is not what they differ by."""
    levels = [
        _median([*ones[start:end], *others[start:end]])
        for middle in range(len(ones))
        for start, end in [(max(0, middle - _AROUND), middle + _AROUND + 1)]
    ]
    return (
        [time - level for time, level in zip(ones, levels, strict=True)],
        [time - level for time, level in zip(others, levels, strict=True)],
    )


def welch_t(ones: Sequence[float], others: Sequence[float]) -> float:
    """Difference of the means over its standard error (Welch, Biometrika 34, 1947)."""
    error = math.sqrt(variance(ones) / len(ones) + variance(others) / len(others))
    distance = fmean(ones) - fmean(others)
    if error:
        return distance / error
    return math.copysign(math.inf, distance) if distance else 0.0


def cropped_t(ones: Sequence[float], others: Sequence[float]) -> float:
    """Welch's t of the crop in which its size is largest."""
    return max((welch_t(*_cropped(ones, others, share)) for share in CROPS), key=abs)


def ks_p(ones: Sequence[float], others: Sequence[float]) -> float:
    """Two-sided p of the two-sample Kolmogorov-Smirnov statistic, by Kolmogorov's limit at
    d * sqrt(n m / (n + m))."""
    size = len(ones) * len(others) / (len(ones) + len(others))
    return kolmogorov_tail(ks_distance(ones, others) * math.sqrt(size))


def ks_distance(ones: Sequence[float], others: Sequence[float]) -> float:
    """Largest distance between the two empirical distribution functions."""
    a, b = sorted(ones), sorted(others)
    largest, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        at = min(a[i], b[j])
        while i < len(a) and a[i] <= at:
            i += 1
        while j < len(b) and b[j] <= at:
            j += 1
        largest = max(largest, abs(i / len(a) - j / len(b)))
    return largest


def kolmogorov_tail(x: float) -> float:
    """P(K > x) of the Kolmogorov distribution: 2 sum (-1)^(k-1) exp(-2 k^2 x^2). Near 0, where that
    sum converges slowly, 1 - sqrt(2 pi) / x sum exp(-(2k-1)^2 pi^2 / (8 x^2))."""
    if x <= 0.0:
        return 1.0
    if x < 1.0:
        terms = (math.exp(-((2 * k - 1) ** 2) * math.pi**2 / (8 * x * x)) for k in range(1, 20))
        return min(1.0, 1.0 - math.sqrt(2 * math.pi) / x * math.fsum(terms))
    tail = math.fsum(-((-1.0) ** k) * math.exp(-2 * k * k * x * x) for k in range(1, 20))
    return max(0.0, 2 * tail)


def _cropped(
    ones: Sequence[float], others: Sequence[float], share: float
) -> tuple[Sequence[float], Sequence[float]]:
    """Both without the times over one bound, which is that of neither set alone."""
    both = sorted([*ones, *others])
    bound = both[math.ceil(share * len(both)) - 1]
    kept = [x for x in ones if x <= bound], [x for x in others if x <= bound]
    # Sets that hardly overlap: cropping would leave nothing of the slower one.
    return kept if min(map(len, kept)) >= _MIN_SAMPLES else (ones, others)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
