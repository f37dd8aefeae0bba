"""Integers written into pages in Triton's interpreter: the bytes of the codecs."""

import pytest
import torch
import triton.language as tl
from kvcluster_kernels.encode_blocks import Blocks
from kvcluster_kernels.encode_integers import IntegerFormat, encode_integers
from triton.language.semantic import TritonSemantic

from kvcluster.codec.array import BlockShape
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from tests.kernels.encode_cases import assert_bytes_of_codec, drawn_blocks

SHAPE = BlockShape(num_heads=2, num_tokens=32, dim=64)
SPANS = {3: (0.92, 0.84), 2: (0.85, 0.7)}
"""As the policies of these names have them."""


def check(form: IntegerFormat, shape: BlockShape, device: torch.device, dtype: torch.dtype) -> None:
    _check_blocks(form, drawn_blocks(shape, device, dtype=dtype))


def _check_blocks(form: IntegerFormat, blocks: Blocks) -> None:
    quantizer = TokenQuantizer if form.is_transposed else ChannelQuantizer
    codec = quantizer(form.bits, group=form.group, scale_bits=form.scale_bits, spans=form.spans)

    assert_bytes_of_codec(
        codec,
        blocks,
        lambda blocks, planes: encode_integers(blocks, form, planes),
        definition_on=torch.device("cpu"),
    )


def check_zeros(form: IntegerFormat, device: torch.device) -> None:
    """Channels of zeros: of 0, of -0, and of both, in either order, below larger numbers too."""
    x_BKSD = torch.zeros(1, *SHAPE)
    x_BKSD[..., 1::4] = -0.0
    x_BKSD[..., ::2, 2::4] = -0.0
    x_BKSD[..., 1::2, 3::4] = -0.0
    x_BKSD[..., ::3, 32:] = 1.5
    blocks = Blocks(x_BKSD.to(device), torch.tensor([3], dtype=torch.int32, device=device))

    _check_blocks(form, blocks)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integers_of_every_width(
    bits: int, scale_bits: int, is_transposed: bool, interpreted: torch.device
) -> None:
    form = IntegerFormat(bits, 16, scale_bits, SPANS.get(bits, ()), is_transposed)

    check(form, SHAPE, interpreted, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_in_half_precision(dtype: torch.dtype, interpreted: torch.device) -> None:
    check(IntegerFormat(4, 64), SHAPE, interpreted, dtype)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_heads_whose_size_is_no_power_of_two(
    is_transposed: bool, interpreted: torch.device
) -> None:
    form = IntegerFormat(4, 32, is_transposed=is_transposed)

    check(form, SHAPE._replace(dim=96), interpreted, torch.float32)


def _negated_as_in_triton_3_6(semantic: TritonSemantic, x: tl.tensor) -> tl.tensor:
    return semantic.sub(
        semantic.to_tensor(0.0 if x.dtype.is_floating() else 0), x, sanitize_overflow=True
    )


@pytest.mark.parametrize("is_negated_from_zero", [False, True])
@pytest.mark.parametrize("bits", [4, 2])
def test_zeros_of_both_signs(
    bits: int,
    is_negated_from_zero: bool,
    interpreted: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_negated_from_zero:
        monkeypatch.setattr(TritonSemantic, "minus", _negated_as_in_triton_3_6)

    check_zeros(IntegerFormat(bits, 16, spans=SPANS.get(bits, ())), interpreted)


def test_groups_that_are_no_power_of_two_are_refused() -> None:
    form = IntegerFormat(4, 128, is_transposed=True)

    with pytest.raises(ValueError, match="want a power of two"):
        check(form, SHAPE._replace(dim=96), torch.device("cpu"), torch.float32)


def test_planes_of_another_shape_are_refused() -> None:
    blocks = drawn_blocks(SHAPE, torch.device("cpu"))

    with pytest.raises(ValueError, match="that lie together"):
        encode_integers(blocks, IntegerFormat(8, 64), (torch.zeros(2, 4, 2, 32, 16),) * 3)
