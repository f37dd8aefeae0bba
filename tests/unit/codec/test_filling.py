"""Bits go to the directions where they save most.

Shape letters: F directions, largest first.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.codec.filling import STEP, Grade, filled_grades

SCALES = 0.5
SPECTRA = st.lists(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=3).map(
        lambda sizes: torch.tensor(sorted(sizes, reverse=True)).repeat_interleave(STEP)
    ),
    min_size=1,
    max_size=2,
)


def bits_of(grades: list[tuple[Grade, ...]]) -> float:
    return sum((grade.bits + SCALES) * grade.num_directions for of in grades for grade in of)


def levels_of(grades: tuple[Grade, ...], num_steps: int) -> list[int]:
    levels = [grade.bits for grade in grades for _ in range(grade.num_directions // STEP)]
    return levels + [0] * (num_steps - len(levels))


def error_of(spectra: list[Tensor], levels: list[int]) -> float:
    """As the allocation sees it: that of codes which span 4.8 standard deviations."""
    steps = torch.cat([spectrum_F.reshape(-1, STEP).sum(1) for spectrum_F in spectra]).tolist()
    shares = [(4.8 / (2**bits - 1)) ** 2 / 12 if bits else 1.0 for bits in levels]
    return sum(error * share for error, share in zip(steps, shares, strict=True))


@given(spectra=SPECTRA, budget=st.floats(1.0, 5.0))
def test_no_other_way_to_spend_the_same_bits_leaves_less_error(
    spectra: list[Tensor], budget: float
) -> None:
    num_steps = [len(spectrum_F) // STEP for spectrum_F in spectra]
    bits = max(budget * sum(map(len, spectra)), STEP * (2 + SCALES) * len(spectra))

    grades = filled_grades(spectra, bits_per_token=bits, scale_share=SCALES)

    assert bits_of(grades) <= bits
    chosen = list(
        itertools.chain.from_iterable(
            levels_of(of, count) for of, count in zip(grades, num_steps, strict=True)
        )
    )
    firsts = {0, num_steps[0]}
    others = [
        levels
        for levels in itertools.product((0, 2, 3, 4, 8), repeat=sum(num_steps))
        if sum((b + SCALES if b else 0) * STEP for b in levels) <= bits_of(grades)
        and all(levels[first] for first in firsts if first < len(levels))
    ]
    least = min(error_of(spectra, list(levels)) for levels in others)
    assert error_of(spectra, chosen) == pytest.approx(least)


def test_wide_codes_go_to_the_large_directions() -> None:
    spectrum_F = 0.94 ** torch.arange(96)

    [grades] = filled_grades([spectrum_F], bits_per_token=400, scale_share=SCALES)

    assert [grade.bits for grade in grades] == [8, 4, 3, 2]
    assert sum(grade.num_directions for grade in grades) < len(spectrum_F)


def test_every_latent_has_directions_however_small_they_are() -> None:
    spectra = [torch.full((32,), 100.0), torch.full((32,), 1e-6)]

    large, small = filled_grades(spectra, bits_per_token=128, scale_share=SCALES)

    assert sum(grade.num_directions for grade in large) > STEP
    assert small == (Grade(2, STEP),)


def test_more_bits_than_all_directions_can_use_are_left() -> None:
    [grades] = filled_grades([torch.ones(20)], bits_per_token=1e6, scale_share=SCALES)

    assert grades == (Grade(8, 16),)


def test_too_few_bits_for_every_latent_are_refused() -> None:
    with pytest.raises(ValueError, match="too few: 2 latents store at least 8 directions each"):
        filled_grades([torch.ones(16)] * 2, bits_per_token=30, scale_share=SCALES)
