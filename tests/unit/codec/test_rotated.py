"""Rotation makes every block Gaussian, and the codebook is the best for that.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from kvcluster.codec.array import BlockShape
from kvcluster.codec.rotated import POSITIVE_LEVELS, Rotated, codebook, rotate, rotate_back, signs

CPU = torch.device("cpu")
GAUSSIAN = NormalDist()
DISTORTION = {4: 0.009497, 3: 0.03454, 2: 0.11748}
"""Mean squared error of a unit Gaussian under the best codebook (Max, 1960)."""


def random_blocks(dim: int, num_blocks: int = 8) -> Tensor:
    return torch.randn(num_blocks, 2, 32, dim, generator=torch.Generator().manual_seed(0))


def decoded(codec: Rotated, x_BKSD: Tensor) -> Tensor:
    positions_BS = torch.arange(x_BKSD.shape[0] * x_BKSD.shape[2]).reshape(-1, x_BKSD.shape[2])
    return codec.decode(codec.encode(x_BKSD, positions_BS), positions_BS)


def relative_error(codec: Rotated, x_BKSD: Tensor) -> float:
    error = (decoded(codec, x_BKSD) - x_BKSD).square().mean() / x_BKSD.square().mean()
    return float(error)


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
def test_each_level_is_the_mean_of_its_cell(bits: int) -> None:
    """Lloyd's condition, of which the codebook is the fixed point."""
    levels = POSITIVE_LEVELS[bits]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]

    for level, (low, high) in zip(levels, pairwise(edges), strict=True):
        mass = GAUSSIAN.cdf(high) - GAUSSIAN.cdf(low)
        assert level == pytest.approx((GAUSSIAN.pdf(low) - GAUSSIAN.pdf(high)) / mass, abs=1e-8)


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
def test_a_codebook_ascends_and_mirrors(bits: int) -> None:
    levels = codebook(bits, CPU)

    assert levels.shape == (1 << bits,)
    assert (levels.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("dim", [8, 64, 128])
def test_the_rotation_is_the_documented_matrix(dim: int) -> None:
    hadamard = torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    )
    matrix = hadamard * signs(dim, CPU) / math.sqrt(dim)
    x_BKSD = random_blocks(dim, num_blocks=1)

    torch.testing.assert_close(rotate(x_BKSD), x_BKSD @ matrix.T)
    torch.testing.assert_close(rotate_back(x_BKSD), x_BKSD @ matrix)


def test_the_signs_are_those_of_the_documented_hash() -> None:
    def sign(channel: int) -> float:
        hashed = (channel + 1) * 0x9E3779B1 % 2**32
        hashed = (hashed ^ (hashed >> 15)) * 0x2C1B3C6D % 2**32
        return -1.0 if (hashed ^ (hashed >> 13)) & 1 else 1.0

    assert signs(512, CPU).tolist() == [sign(channel) for channel in range(512)]


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_signs_are_balanced(dim: int) -> None:
    """Within three standard deviations of a fair coin."""
    assert abs(signs(dim, CPU).sum()) < 3 * math.sqrt(dim)


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
@pytest.mark.parametrize("dim", [64, 256])
def test_the_error_is_the_codebook_s(bits: int, dim: int) -> None:
    """Restoring the norm turns an error d into 2 - 2 sqrt(1 - d)."""
    expected = 2 - 2 * math.sqrt(1 - DISTORTION[bits])

    # Vectors of one norm have shorter tails than Gaussian ones: 1.5 / D less at most.
    assert relative_error(Rotated(bits), random_blocks(dim)) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
def test_dot_products_shrink_by_no_more_than_half_the_error(bits: int) -> None:
    x_BKSD = random_blocks(128)
    query_D = torch.randn(128, generator=torch.Generator().manual_seed(1))
    true = (x_BKSD @ query_D).flatten()

    slope = ((decoded(Rotated(bits), x_BKSD) @ query_D).flatten() @ true) / (true @ true)

    assert slope == pytest.approx(math.sqrt(1 - DISTORTION[bits]), abs=0.02)


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_a_vector_keeps_its_norm(bits: int, magnitude: float) -> None:
    x_BKSD = magnitude * random_blocks(64)

    # A float16 scale is within 2^-11; near 6e-5 and below its spacing is fixed.
    torch.testing.assert_close(
        decoded(Rotated(bits), x_BKSD).norm(dim=-1), x_BKSD.norm(dim=-1), rtol=2.0**-10, atol=0
    )


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
def test_one_outlier_channel_is_spread_over_all(bits: int) -> None:
    x_BKSD = random_blocks(64)
    x_BKSD[..., 7] += 20

    # A vector along one channel has coordinates of one size, which no codebook suits best.
    assert relative_error(Rotated(bits), x_BKSD) < 1.5 * DISTORTION[bits]


@pytest.mark.parametrize("bits", POSITIVE_LEVELS)
@pytest.mark.parametrize("transposed", [False, True])
def test_centring_makes_a_shared_mean_free(bits: int, transposed: bool) -> None:
    codec = Rotated(bits, centred=True, transposed=transposed)
    x_BKSD = random_blocks(64)
    shifted = x_BKSD.clone()
    shifted[..., :4] += 8

    plain = (decoded(codec, x_BKSD) - x_BKSD).square().mean().item()
    moved = (decoded(codec, shifted) - shifted).square().mean().item()

    # A float16 mean near 8 is rounded by up to 2^-8: the residuals' codes differ here and there.
    assert moved == pytest.approx(plain, rel=0.02)


def test_the_layout_changes_no_number() -> None:
    x_BKSD = random_blocks(64)

    assert torch.equal(decoded(Rotated(3), x_BKSD), decoded(Rotated(3, transposed=True), x_BKSD))


@pytest.mark.parametrize("dim", [4, 80, 96, 192])
def test_a_head_dimension_that_is_no_power_of_two_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"power of two from 8 up, not {dim}"):
        Rotated(4).planes(BlockShape(1, 64, dim))


def test_tokens_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8, not 12"):
        Rotated(3, transposed=True).planes(BlockShape(1, 12, 64))


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_bits_without_a_codebook_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be one of 4, 3, 2, not {bits}"):
        Rotated(bits)
