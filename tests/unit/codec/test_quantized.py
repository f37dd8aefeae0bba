"""The quantizers' bytes say what is documented, and their error is half a step.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.codec.array import BlockShape
from kvcluster.codec.packing import num_code_planes, unpack
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer

NO_POSITIONS = torch.zeros(1, 0, dtype=torch.int64)
"""Decoding needs none, but a row for each block."""


def random_block(seed: int = 0, num_tokens: int = 32, dim: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, num_tokens, dim, generator=generator)


def places(x_BKSD: Tensor) -> Tensor:
    """Positions of the tokens of one block."""
    return torch.arange(x_BKSD.shape[2])[None]


def steps_of(codec: ChannelQuantizer, planes: tuple[Tensor, ...]) -> Tensor:
    """The step of every number, read as the format describes it."""
    scale, *_ = planes[num_code_planes(codec.bits) :]
    if codec.scale_bits == 8:
        unit_BK = planes[-1]
        halves = (scale.to(torch.int16) << 5).view(torch.float16)
        step = halves.float() * unit_BK[..., None, None]
    else:
        step = scale.float()
    return step.repeat_interleave(codec.group, dim=2)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([8, 4, 3, 2]),
    scale_bits=st.sampled_from([16, 8]),
    magnitude=st.floats(-9, 4),
    offset=st.floats(-100, 100),
    seed=st.integers(0, 99),
)
def test_the_error_is_at_most_half_a_step(
    bits: int, scale_bits: int, magnitude: float, offset: float, seed: int
) -> None:
    codec = ChannelQuantizer(bits, group=16, scale_bits=scale_bits)
    x_BKSD = random_block(seed) * 10.0**magnitude + offset
    planes = codec.encode(x_BKSD, places(x_BKSD))

    error = (codec.decode(planes, NO_POSITIONS) - x_BKSD).abs()

    # Beside half a step: float32 rounds the quotient and the product.
    assert (error <= steps_of(codec, planes) / 2 + x_BKSD.abs().max() * 2.0**-22).all()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_scale_and_zero_fold_into_the_query(bits: int) -> None:
    """What a kernel computes of a block of keys, one group of tokens after another."""
    codec = ChannelQuantizer(bits, group=16)
    planes = codec.encode(random_block(), places(random_block()))
    codes_KSD = unpack(planes[: num_code_planes(bits)], bits)[0].float()
    scale_KGD, zero_KGD = (plane[0].float() for plane in planes[-2:])
    query_D = torch.randn(16, generator=torch.Generator().manual_seed(1))

    scores = [
        codes_KSD[:, 16 * g : 16 * g + 16] @ (query_D * scale_KGD[:, g])[..., None]
        + (zero_KGD[:, g] @ query_D)[:, None, None]
        for g in range(2)
    ]

    expected = codec.decode(planes, NO_POSITIONS)[0] @ query_D
    torch.testing.assert_close(torch.cat(scores, dim=1)[..., 0], expected)


def test_byte_zeros_are_multiples_of_the_scale() -> None:
    codec = ChannelQuantizer(4, group=16, scale_bits=8)
    planes = codec.encode(random_block() + 1, places(random_block() + 1))
    codes, _, zero, _ = planes
    codes_KGND = unpack([codes], 4)[0].float().reshape(2, 2, 16, 16)

    multiples = (codes_KGND + zero[0, :, :, None]).reshape(2, 32, 16)

    expected = codec.decode(planes, NO_POSITIONS)
    torch.testing.assert_close(multiples * steps_of(codec, planes)[0], expected[0])


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_values_are_stored_as_keys_of_the_transposed_block(scale_bits: int) -> None:
    x_BKSD = random_block()

    of_values = TokenQuantizer(4, group=8, scale_bits=scale_bits).encode(x_BKSD, places(x_BKSD))
    of_keys = ChannelQuantizer(4, group=8, scale_bits=scale_bits).encode(
        x_BKSD.transpose(2, 3), places(x_BKSD.transpose(2, 3))
    )

    assert all(torch.equal(a, b) for a, b in zip(of_values, of_keys, strict=True))


def test_a_nibble_of_a_value_holds_tokens_half_a_block_apart() -> None:
    x_BKSD = torch.zeros(1, 1, 8, 16)
    x_BKSD[0, 0, 6, ::2] = 1

    codes, *_ = TokenQuantizer(4).encode(x_BKSD, places(x_BKSD))

    assert codes.shape == (1, 1, 16, 4)
    assert codes[0, 0, :2].tolist() == [[0, 0, 0xF0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("constant", [0.0, 3.0, -2.5, 65504.0, 2.0**-24])
def test_a_constant_that_is_a_float16_comes_back(bits: int, constant: float) -> None:
    codec = ChannelQuantizer(bits)
    x_BKSD = torch.full((1, 2, 32, 16), constant)

    assert torch.equal(codec.decode(codec.encode(x_BKSD, places(x_BKSD)), NO_POSITIONS), x_BKSD)


@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize("spans", [(), (0.85, 0.7)])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_zeros_of_either_sign_are_stored_as_the_same_bytes(
    bits: int, spans: tuple[float, ...], scale_bits: int
) -> None:
    """Whichever of them a device takes for the least and the largest."""
    codec = ChannelQuantizer(bits, scale_bits=scale_bits, spans=spans)
    of_zeros = codec.encode(x_BKSD := torch.zeros(1, 2, 32, 16), places(x_BKSD))

    for signed_BKSD in (-x_BKSD, torch.where(torch.arange(16) % 3 == 0, -x_BKSD, x_BKSD)):
        planes = codec.encode(signed_BKSD, places(signed_BKSD))
        for found, wanted in zip(planes, of_zeros, strict=True):
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_a_group_s_smallest_bfloat16_comes_back() -> None:
    codec = ChannelQuantizer(2)
    x_BKSD = random_block().to(torch.bfloat16)

    decoded = codec.decode(codec.encode(x_BKSD, places(x_BKSD)), NO_POSITIONS)

    assert torch.equal(decoded.amin(dim=2), x_BKSD.amin(dim=2).float())


def test_an_outlier_channel_changes_no_other() -> None:
    codec = ChannelQuantizer(4)
    x_BKSD = random_block()
    with_outlier = x_BKSD.clone()
    with_outlier[..., 5] *= 1000

    difference = codec.decode(
        codec.encode(with_outlier, places(with_outlier)), NO_POSITIONS
    ) - codec.decode(codec.encode(x_BKSD, places(x_BKSD)), NO_POSITIONS)

    assert difference.any(dim=2).nonzero()[:, -1].unique().tolist() == [5]


def test_a_shared_mean_costs_keys_nothing() -> None:
    codec = ChannelQuantizer(4)
    x_BKSD = random_block()
    shifted = x_BKSD.clone()
    shifted[..., :4] += 8

    plain = (
        (codec.decode(codec.encode(x_BKSD, places(x_BKSD)), NO_POSITIONS) - x_BKSD).square().mean()
    )
    moved = (
        (codec.decode(codec.encode(shifted, places(shifted)), NO_POSITIONS) - shifted)
        .square()
        .mean()
    )

    # A float16 near 8 is 2^-8 to 2^-7 from its neighbour, a tenth of a step here.
    assert moved < 1.1 * plain


@pytest.mark.parametrize("codec_class", [ChannelQuantizer, TokenQuantizer])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_byte_scales_cost_less_than_the_bits_they_save(
    codec_class: type[ChannelQuantizer] | type[TokenQuantizer], bits: int
) -> None:
    """A quarter of a bit is worth a factor 2^(2/4) of squared error."""
    x_BKSD = random_block(num_tokens=64, dim=64)

    half, byte = (
        (codec.decode(codec.encode(x_BKSD, places(x_BKSD)), NO_POSITIONS) - x_BKSD).square().mean()
        for codec in (codec_class(bits), codec_class(bits, scale_bits=8))
    )

    assert byte < 1.1 * half


def test_byte_zeros_far_from_zero_lose_a_256th_of_the_number() -> None:
    codec = ChannelQuantizer(4, scale_bits=8)
    x_BKSD = 100 + random_block() / 10

    error = (codec.decode(codec.encode(x_BKSD, places(x_BKSD)), NO_POSITIONS) - x_BKSD).abs()

    # The scale itself is rounded up by at most a 32nd.
    assert (error <= x_BKSD * (1 + 1 / 32) / 254).all()


@pytest.mark.parametrize(("bits", "gain"), [(3, 1.1), (2, 1.5)])
@pytest.mark.parametrize("scale_bits", [16, 8])
def test_spans_reduce_the_error_of_few_bits(bits: int, gain: float, scale_bits: int) -> None:
    """On Gaussian numbers, whose tails a range from least to most serves at the middle's cost."""
    x_BKSD = random_block(num_tokens=64, dim=64)
    whole = ChannelQuantizer(bits, scale_bits=scale_bits)
    spanned = ChannelQuantizer(bits, scale_bits=scale_bits, spans=(0.85, 0.7))

    of_whole, of_spanned = (
        (codec.decode(codec.encode(x_BKSD, places(x_BKSD)), NO_POSITIONS) - x_BKSD).square().mean()
        for codec in (whole, spanned)
    )

    assert of_spanned * gain < of_whole


def test_a_group_that_spans_do_not_help_covers_its_whole_range() -> None:
    x_BKSD = random_block().sign()

    spanned = ChannelQuantizer(2, spans=(0.85, 0.7)).encode(x_BKSD, places(x_BKSD))

    whole = ChannelQuantizer(2).encode(x_BKSD, places(x_BKSD))
    assert all(torch.equal(a, b) for a, b in zip(spanned, whole, strict=True))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_bfloat16_blocks_encoded_again_are_read_the_same(bits: int) -> None:
    """Bfloat16 minima are exact float16 zeros, and a group's ends are its first and last code."""
    codec = ChannelQuantizer(bits)
    x_BKSD = random_block().to(torch.bfloat16)
    once = codec.decode(codec.encode(x_BKSD, places(x_BKSD)), NO_POSITIONS)

    assert torch.equal(codec.decode(codec.encode(once, places(once)), NO_POSITIONS), once)


@pytest.mark.parametrize("codec_class", [ChannelQuantizer, TokenQuantizer])
def test_a_group_longer_than_its_axis_is_the_axis(
    codec_class: type[ChannelQuantizer] | type[TokenQuantizer],
) -> None:
    shape = BlockShape(2, 16, 16)

    assert codec_class(4, group=64).planes(shape) == codec_class(4, group=16).planes(shape)


def test_tokens_that_do_not_fill_their_groups_are_refused() -> None:
    with pytest.raises(
        ValueError, match="tokens of a block, in groups of 32, must be a multiple of 32, not 48"
    ):
        ChannelQuantizer(4, group=32).planes(BlockShape(1, 48, 64))


def test_channels_that_do_not_fill_their_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head dimension, in groups of 64, .* not 96"):
        TokenQuantizer(4).encode(torch.zeros(1, 1, 16, 96), places(torch.zeros(1, 1, 16, 96)))


@pytest.mark.parametrize(
    ("bits", "group", "scale_bits", "message"),
    [
        (5, 64, 16, "bits must be one of 8, 4, 3, 2, not 5"),
        (4, 1, 16, "group must be 2 or more, not 1"),
        (4, 64, 4, "scale_bits must be one of 16, 8, not 4"),
    ],
)
def test_parameters_that_are_not_offered_are_refused(
    bits: int, group: int, scale_bits: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelQuantizer(bits, group, scale_bits)


@pytest.mark.parametrize("span", [0.0, 1.0, -0.5, float("nan")])
def test_a_span_that_is_no_part_of_the_range_is_refused(span: float) -> None:
    with pytest.raises(ValueError, match="spans must be above 0 and below 1"):
        TokenQuantizer(2, spans=(0.7, span))
