"""How many bits each direction of a latent gets: reverse water-filling.

Directions are of very different size, and a bit is worth most where the error is largest: the
least total error for a number of bits leaves the same error on every direction that is stored,
and stores none that is smaller (Cover & Thomas, Elements of Information Theory, 10.3.3). Here bits
are whole (8, 4, 3, 2 or none) and directions come by eights, so that codes fill whole bytes. The
leading directions want the 8: rounding one of them to 4 bits can cost as much as leaving out a
hundred times smaller one, which is why a spectrum in units of the loss (`quality/fisher.py`) tells
more than one in units of a layer's own error.

Shape letters: F directions, largest first.
"""

import heapq
from collections.abc import Sequence
from typing import Final, NamedTuple

from torch import Tensor

STEP: Final = 8
"""Directions that get the same bits."""
_BITS: Final = (0, 2, 3, 4, 8)
_RANGE: Final = 4.8
"""Between the least and the largest of 64 normal numbers, in standard deviations, as expected: what
the codes of a group span."""


class Grade(NamedTuple):
    """Neighbouring directions with codes of the same width."""

    bits: int
    num_directions: int


class _Raise(NamedTuple):
    """Some directions of a layer get their next bits. Ordered by what that saves a bit."""

    negative_saving: float
    layer: int
    step: int
    """Which `STEP` directions."""
    level: int
    """The index in `_BITS` that they get."""


def filled_grades(
    spectra: Sequence[Tensor], *, bits_per_token: float, scale_share: float
) -> list[tuple[Grade, ...]]:
    """The grades of each layer, or group of layers, best first.

    `spectra`: what error each direction leaves where it is not stored, largest first; of them as
    many are considered as fill whole steps. `bits_per_token`: of all of them together, scales
    included; what is given comes to less than one step short of it, unless all directions have the
    most bits. `scale_share`: bits that scales add to each number of a stored direction.
    Every layer stores `STEP` directions at least. Raises: ValueError where that takes more bits.
    """
    steps = [spectrum_F[: len(spectrum_F) // STEP * STEP].double() for spectrum_F in spectra]
    errors = [spectrum_F.reshape(-1, STEP).sum(1).tolist() for spectrum_F in steps]
    left = bits_per_token / STEP
    given = [[0] * len(of_layer) for of_layer in errors]
    raises: list[_Raise] = []
    for layer, of_layer in enumerate(errors):
        given[layer][0] = 1
        left -= _cost(1, scale_share)
        raises += [_raised(of_layer[0], layer, 0, 2, scale_share)]
        raises += [_raised(of_layer[n], layer, n, 1, scale_share) for n in range(1, len(of_layer))]
    if left < 0:
        raise ValueError(
            f"{bits_per_token:g} bits a token are too few: {len(spectra)} latents store at least "
            f"{STEP} directions each"
        )
    heapq.heapify(raises)
    while raises:
        _, layer, step, level = heapq.heappop(raises)
        cost = _cost(level, scale_share)
        if cost > left:
            break
        left -= cost
        given[layer][step] = level
        if level + 1 < len(_BITS):
            error = errors[layer][step]
            heapq.heappush(raises, _raised(error, layer, step, level + 1, scale_share))
    return [_grades(levels) for levels in given]


def _raised(error: float, layer: int, step: int, level: int, scale_share: float) -> _Raise:
    saving = error * (_error_share(level - 1) - _error_share(level)) / _cost(level, scale_share)
    return _Raise(-saving, layer, step, level)


def _cost(level: int, scale_share: float) -> float:
    """Bits a number, more than for the level below."""
    more = _BITS[level] - _BITS[level - 1]
    return more + scale_share if level == 1 else more


def _error_share(level: int) -> float:
    """Squared error of a normal number of variance 1 at these bits; 1 where nothing is stored."""
    bits = _BITS[level]
    return (_RANGE / ((1 << bits) - 1)) ** 2 / 12 if bits else 1.0


def _grades(levels: Sequence[int]) -> tuple[Grade, ...]:
    # A larger direction is raised before a smaller one, so levels fall.
    counts = {bits: levels.count(level) * STEP for level, bits in enumerate(_BITS) if bits}
    return tuple(Grade(bits, counts[bits]) for bits in sorted(counts, reverse=True) if counts[bits])
