"""Rotated vectors written into pages in Triton's interpreter: the bytes of the codec."""

import pytest
import torch
from kvcluster_kernels.encode_rotated import RotatedFormat, encode_rotated

from kvcluster.codec.array import BlockShape
from kvcluster.codec.rotated import Rotated, codebook, signs
from tests.kernels.encode_cases import assert_bytes_of_codec, drawn_blocks

SHAPE = BlockShape(num_heads=2, num_tokens=32, dim=64)


def check(codec: Rotated, shape: BlockShape, device: torch.device, dtype: torch.dtype) -> None:
    form = RotatedFormat(
        codec.bits,
        codebook(codec.bits, device),
        signs(shape.dim, device),
        codec.centred,
        codec.transposed,
    )

    assert_bytes_of_codec(
        codec,
        drawn_blocks(shape, device, dtype=dtype),
        lambda blocks, planes: encode_rotated(blocks, form, planes),
        definition_on=torch.device("cpu"),
    )


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_rotated_vectors(
    bits: int, is_centred: bool, is_transposed: bool, interpreted: torch.device
) -> None:
    check(Rotated(bits, is_centred, is_transposed), SHAPE, interpreted, torch.float32)


@pytest.mark.parametrize("dim", [8, 128])
def test_heads_of_other_sizes_in_half_precision(dim: int, interpreted: torch.device) -> None:
    check(Rotated(4, centred=True), SHAPE._replace(dim=dim), interpreted, torch.bfloat16)


def test_heads_whose_size_is_no_power_of_two_are_refused() -> None:
    blocks = drawn_blocks(SHAPE._replace(dim=96), torch.device("cpu"))
    form = RotatedFormat(4, torch.zeros(16), torch.zeros(96))

    with pytest.raises(ValueError, match="powers of two"):
        encode_rotated(blocks, form, ())
