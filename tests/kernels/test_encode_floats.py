"""Floats written into pages in Triton's interpreter: the bytes of the codecs."""

import pytest
import torch
from kvcluster_kernels.encode_blocks import Blocks
from kvcluster_kernels.encode_floats import encode_float8, encode_halves
from torch import Tensor

from kvcluster.codec.array import BlockShape
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.float8 import Float8
from tests.kernels.encode_cases import assert_bytes_of_codec, drawn_blocks

SHAPE = BlockShape(num_heads=2, num_tokens=32, dim=64)
SHAPES = (SHAPE, SHAPE._replace(dim=96), SHAPE._replace(num_tokens=16))


def check_float8(shape: BlockShape, device: torch.device, *, is_transposed: bool) -> None:
    def encode(blocks: Blocks, planes: tuple[Tensor, ...]) -> None:
        encode_float8(blocks, (planes[0], planes[1]), is_transposed=is_transposed)

    assert_bytes_of_codec(
        Float8(is_transposed),
        drawn_blocks(shape, device),
        encode,
        definition_on=torch.device("cpu"),
    )


def check_halves(
    shape: BlockShape, device: torch.device, stored: torch.dtype, given: torch.dtype
) -> None:
    assert_bytes_of_codec(
        ExactArray(stored),
        drawn_blocks(shape, device, dtype=given),
        lambda blocks, planes: encode_halves(blocks, planes[0]),
    )


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_float8(shape: BlockShape, is_transposed: bool, interpreted: torch.device) -> None:
    check_float8(shape, interpreted, is_transposed=is_transposed)


def test_every_float8_and_what_lies_half_way_between_two_of_them(interpreted: torch.device) -> None:
    """256 bytes, and for each the numbers on both sides of half way to the next."""
    finite = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half_way = (finite[1:] + finite[:-1]) / 2
    numbers = torch.cat([finite, half_way, half_way.nextafter(finite[1:]), half_way * (1 - 1e-7)])
    numbers = torch.cat([numbers, -numbers])
    numbers = torch.nn.functional.pad(numbers, (0, 1024 - len(numbers)))
    # Where the largest number is 448, the scale is 1.
    blocks = Blocks(numbers.view(1, 1, 16, 64), torch.zeros(1, dtype=torch.int32))

    assert_bytes_of_codec(
        Float8(), blocks, lambda blocks, planes: encode_float8(blocks, (planes[0], planes[1]))
    )


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_numbers_of_16_bits(
    given: torch.dtype, stored: torch.dtype, interpreted: torch.device
) -> None:
    check_halves(SHAPE, interpreted, stored, given)
