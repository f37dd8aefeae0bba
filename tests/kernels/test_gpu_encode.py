"""Blocks written into pages by kernels compiled for the GPU: the bytes of the codecs on a CPU."""

import pytest
import torch
from kvcluster_kernels.encode_integers import IntegerFormat

from kvcluster.codec.array import BlockShape
from kvcluster.codec.rotated import Rotated
from tests.kernels.test_encode_floats import check_float8, check_halves
from tests.kernels.test_encode_integers import SPANS, check_zeros
from tests.kernels.test_encode_integers import check as check_integers
from tests.kernels.test_encode_latents import FORMS
from tests.kernels.test_encode_latents import check as check_latents
from tests.kernels.test_encode_rotated import check as check_rotated

pytestmark = pytest.mark.gpu

SHAPES = {dim: BlockShape(num_heads=4, num_tokens=64, dim=dim) for dim in (64, 128, 256)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_integers(
    dim: int, bits: int, scale_bits: int, is_transposed: bool, dtype: torch.dtype,
    gpu: torch.device,
) -> None:  # fmt: skip
    form = IntegerFormat(bits, 32, scale_bits, SPANS.get(bits, ()), is_transposed)

    check_integers(form, SHAPES[dim], gpu, dtype)


@pytest.mark.parametrize("bits", [4, 2])
def test_zeros_of_both_signs(bits: int, gpu: torch.device) -> None:
    check_zeros(IntegerFormat(bits, 16, spans=SPANS.get(bits, ())), gpu)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dim", SHAPES)
def test_float8(dim: int, is_transposed: bool, gpu: torch.device) -> None:
    check_float8(SHAPES[dim], gpu, is_transposed=is_transposed)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits(stored: torch.dtype, gpu: torch.device) -> None:
    check_halves(SHAPES[128], gpu, stored, torch.float32)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_rotated_vectors(
    dim: int, bits: int, is_centred: bool, is_transposed: bool, gpu: torch.device
) -> None:
    check_rotated(Rotated(bits, is_centred, is_transposed), SHAPES[dim], gpu, torch.bfloat16)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_latents(form: IntegerFormat | None, gpu: torch.device) -> None:
    check_latents(form, 128, SHAPES[64], gpu)
