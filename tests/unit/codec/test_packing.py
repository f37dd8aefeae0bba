"""Codes fill their bytes as documented, and come back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.codec.packing import CODE_BITS, code_planes, pack, unpack


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@given(bits=st.sampled_from(CODE_BITS), rows=st.integers(1, 5), octets=st.integers(1, 9))
def test_codes_come_back_from_their_planes(bits: int, rows: int, octets: int) -> None:
    codes = random_codes(bits, rows, 8 * octets)

    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_planes_are_as_announced_and_as_long_as_the_bits(bits: int) -> None:
    packed = pack(random_codes(bits, 3, 16), bits)

    announced = code_planes((3, 16), bits)
    assert [(plane.shape, plane.dtype) for plane in announced] == [
        (plane.shape, plane.dtype) for plane in packed
    ]
    assert sum(plane.num_bytes for plane in announced) == 3 * 16 * bits // 8


@pytest.mark.parametrize("bits", CODE_BITS)
def test_packing_codes_that_are_not_contiguous_gives_contiguous_planes(bits: int) -> None:
    codes = random_codes(bits, 16, 24)

    packed = pack(codes.T, bits)

    assert all(plane.is_contiguous() for plane in packed)
    assert torch.equal(unpack(packed, bits), codes.T)


def test_a_byte_of_four_bit_codes_holds_both_halves_of_the_axis() -> None:
    (plane,) = pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4)

    assert plane.tolist() == [0x31, 0x42]


def test_a_byte_of_two_bit_codes_holds_the_four_quarters_of_the_axis() -> None:
    (plane,) = pack(torch.tensor([0, 1, 1, 2, 2, 3, 3, 0], dtype=torch.uint8), 2)

    assert plane.tolist() == [0b11_10_01_00, 0b00_11_10_01]


def test_three_bit_codes_are_two_low_bits_in_quarters_and_a_high_bit_in_eighths() -> None:
    low, high = pack(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8), 3)

    assert low.tolist() == [0b10_00_10_00, 0b11_01_11_01]
    assert high.tolist() == [0b1111_0000]


def test_eight_bit_codes_are_signed_around_their_middle() -> None:
    (plane,) = pack(torch.tensor([0, 127, 128, 255], dtype=torch.uint8), 8)

    assert plane.tolist() == [-128, -1, 0, 127]


@pytest.mark.parametrize(("bits", "length", "divisor"), [(4, 7, 2), (2, 6, 4), (3, 12, 8)])
def test_an_axis_that_does_not_fill_its_bytes_is_refused(
    bits: int, length: int, divisor: int
) -> None:
    with pytest.raises(ValueError, match=f"multiple of {divisor}, not {length}"):
        code_planes((2, length), bits)


def test_a_width_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be one of 8, 4, 3, 2, not 5"):
        code_planes((8,), 5)
