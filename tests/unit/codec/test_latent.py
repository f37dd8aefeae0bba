"""Latents keep the promises of array codecs, and of their basis.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension, C latent dimension.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, consecutive
from kvcluster.codec.basis import Basis
from kvcluster.codec.calibration import fit_keys, fit_values
from kvcluster.codec.filling import Grade
from kvcluster.codec.latent import LatentKeys, LatentStorage, LatentValues
from kvcluster.codec.moments import MomentSums
from kvcluster.codec.packing import CODE_BITS

SHAPE = BlockShape(num_heads=3, num_tokens=32, dim=16)
WIDTH = 48
LOW_RANK = 16


class Turn:
    """A rotation of each channel of the first half with one of the second."""

    def apply(self, x_BKSD: Tensor, positions_BS: Tensor) -> Tensor:
        first, second = x_BKSD.double().chunk(2, dim=-1)
        angles = positions_BS[:, None, :, None] * 0.5 ** torch.arange(SHAPE.dim // 2).double()
        return torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
            ],
            dim=-1,
        ).float()

    def undo(self, x_BKSD: Tensor, positions_BS: Tensor) -> Tensor:
        return self.apply(x_BKSD, -positions_BS)


TURN = Turn()


def low_rank_blocks(num_blocks: int, seed: int = 0) -> Tensor:
    """Blocks before rotation that lie in LOW_RANK directions around a mean far from 0."""
    directions = torch.randn(LOW_RANK, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    latent_BSC = torch.randn(num_blocks, SHAPE.num_tokens, LOW_RANK, generator=generator)
    x_BSF = latent_BSC @ directions + 3
    return x_BSF.reshape(num_blocks, SHAPE.num_tokens, 3, SHAPE.dim).transpose(1, 2).contiguous()


def positions_of(x_BKSD: Tensor) -> Tensor:
    return consecutive(torch.arange(x_BKSD.shape[0]) * SHAPE.num_tokens + 1_024, SHAPE.num_tokens)


def rotated(x_BKSD: Tensor) -> Tensor:
    return TURN.apply(x_BKSD, positions_of(x_BKSD))


def fitted() -> tuple[Basis, Basis]:
    x_TKD = low_rank_blocks(32, seed=7).transpose(1, 2).flatten(0, 1)
    generator = torch.Generator().manual_seed(8)
    sums = MomentSums(3, SHAPE.dim, SHAPE.dim)
    sums.add(torch.randn(len(x_TKD), 6, SHAPE.dim, generator=generator), x_TKD, x_TKD)
    moments = sums.moments()
    return fit_keys(moments, rank=WIDTH), fit_values(moments, rank=WIDTH)


KEYS, VALUES = fitted()


def latent_keys(rank: int = LOW_RANK, bits: int | None = None, scale_bits: int = 16) -> LatentKeys:
    storage = LatentStorage(bits=bits, group=16, scale_bits=scale_bits)
    return LatentKeys(KEYS, num_heads=3, rank=rank, rotation=TURN, storage=storage)


def latent_values(
    rank: int = LOW_RANK,
    bits: int | None = None,
    grades: tuple[Grade, ...] = (),
    *,
    is_rotated: bool = False,
) -> LatentValues:
    storage = LatentStorage(bits=bits, is_rotated=is_rotated, group=16, grades=grades)
    return LatentValues(VALUES, num_heads=3, rank=rank, storage=storage)


CODECS: dict[str, ArrayCodec] = {
    "keys": latent_keys(),
    "keys-8": latent_keys(bits=8),
    "keys-4": latent_keys(bits=4),
    "keys-4-bytes": latent_keys(bits=4, scale_bits=8),
    "keys-3": latent_keys(bits=3),
    "keys-full-rank": latent_keys(rank=WIDTH),
    "keys-unrotated": LatentKeys(KEYS, num_heads=3, rank=24, rotation=None),
    "values": latent_values(),
    "values-4": latent_values(bits=4),
    "values-3": latent_values(rank=24, bits=3),
    "values-rotated": latent_values(rank=16, bits=2, is_rotated=True),
    "values-rotated-sections": latent_values(rank=24, bits=2, is_rotated=True),
    "values-graded": latent_values(rank=32, grades=(Grade(4, 16), Grade(3, 8), Grade(2, 8))),
}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> ArrayCodec:
    return CODECS[request.param]


def relative_error(restored: Tensor, x: Tensor) -> float:
    """Over the part of x that is not its mean, which costs nothing."""
    return float((restored - x).norm() / (x - x.mean(dim=(0, 2), keepdim=True)).norm())


def round_trip(codec: ArrayCodec, x_BKSD: Tensor) -> Tensor:
    positions_BS = positions_of(x_BKSD)
    return codec.decode(codec.encode(x_BKSD, positions_BS), positions_BS)


def test_planes_are_what_encoding_gives(codec: ArrayCodec) -> None:
    x_BKSD = low_rank_blocks(3)

    for tensor, plane in zip(
        codec.encode(x_BKSD, positions_of(x_BKSD)), codec.planes(SHAPE), strict=True
    ):
        assert tensor.shape == (3, *plane.shape)
        assert tensor.dtype == plane.dtype
        assert tensor.is_contiguous()


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(CODECS)), num_blocks=st.integers(1, 9), data=st.data())
def test_a_block_has_the_same_bytes_alone_and_among_others(
    name: str, num_blocks: int, data: st.DataObject
) -> None:
    codec = CODECS[name]
    x_BKSD = rotated(low_rank_blocks(num_blocks, seed=data.draw(st.integers(0, 99))))
    positions_BS = positions_of(x_BKSD)
    block = slice(one := data.draw(st.integers(0, num_blocks - 1)), one + 1)

    together = codec.encode(x_BKSD, positions_BS)
    alone = codec.encode(x_BKSD[block], positions_BS[block])

    assert all(torch.equal(t[block], a) for t, a in zip(together, alone, strict=True))
    decoded = codec.decode(together, positions_BS)
    assert torch.equal(decoded[block], codec.decode(alone, positions_BS[block]))


def test_other_memory_layouts_give_the_same_bytes(codec: ArrayCodec) -> None:
    x_BKSD = low_rank_blocks(2)
    strided = x_BKSD.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)

    planes, same = (codec.encode(x, positions_of(x_BKSD)) for x in (x_BKSD, strided))

    assert all(torch.equal(a, b) for a, b in zip(planes, same, strict=True))


def test_half_precision_is_computed_in_float32(codec: ArrayCodec) -> None:
    x_BKSD = low_rank_blocks(2).bfloat16()

    planes, same = (codec.encode(x, positions_of(x_BKSD)) for x in (x_BKSD, x_BKSD.float()))

    assert all(torch.equal(a, b) for a, b in zip(planes, same, strict=True))


def test_input_and_planes_are_left_alone(codec: ArrayCodec) -> None:
    x_BKSD = rotated(low_rank_blocks(2))
    before = x_BKSD.clone()
    planes = codec.encode(x_BKSD, positions_of(x_BKSD))
    planes_before = [plane.clone() for plane in planes]

    codec.decode(planes, positions_of(x_BKSD)).zero_()

    assert torch.equal(x_BKSD, before)
    assert all(torch.equal(a, b) for a, b in zip(planes, planes_before, strict=True))


@pytest.mark.parametrize("size", [0.0, 1e-42, 65504.0, 3.4e38])
def test_blocks_at_the_edge_of_floats_stay_finite(codec: ArrayCodec, size: float) -> None:
    x_BKSD = size * low_rank_blocks(2).sign()

    assert round_trip(codec, x_BKSD).isfinite().all()


def test_no_blocks_give_no_blocks(codec: ArrayCodec) -> None:
    assert round_trip(codec, torch.empty(0, *SHAPE)).shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("bits", "allowed"),
    # Twice the root mean square of a rounding step: 2^-11 of a float16; of a group of 16 Gaussian
    # numbers, which spans 3.5 deviations, 3.5 / (2^bits - 1) / sqrt(12).
    [(None, 0.001), (8, 0.008), (4, 0.14), (3, 0.29)],
)
def test_keys_of_the_rank_of_the_basis_lose_the_rounding_of_latents_alone(
    bits: int | None, allowed: float
) -> None:
    x_BKSD = rotated(low_rank_blocks(4))

    assert relative_error(round_trip(latent_keys(bits=bits), x_BKSD), x_BKSD) < allowed


@pytest.mark.parametrize("codec", [latent_keys(rank=WIDTH), latent_values(rank=WIDTH)])
def test_full_rank_restores_any_blocks_to_the_rounding_of_float16(codec: ArrayCodec) -> None:
    """Directions that the calibration text did not have included: there a latent is in units of a
    thousandth of the largest deviation, so its numbers are large and their rounding relative."""
    x_BKSD = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))

    # 2^-11 of each latent; queries weigh directions unequally, which spreads it by up to 3.
    assert float((round_trip(codec, x_BKSD) - x_BKSD).norm() / x_BKSD.norm()) < 0.002


def test_a_lower_rank_stores_a_prefix_of_the_higher_one() -> None:
    x_BKSD = rotated(low_rank_blocks(2))
    (low,), (high,) = (latent_keys(rank).encode(x_BKSD, positions_of(x_BKSD)) for rank in (8, 24))

    assert torch.equal(low, high[..., :8])


def test_error_falls_with_the_rank() -> None:
    x_BKSD = rotated(low_rank_blocks(4))

    errors = [
        relative_error(round_trip(latent_keys(rank), x_BKSD), x_BKSD) for rank in (4, 8, 12, 16)
    ]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_keys_are_projected_as_they_were_before_rotation() -> None:
    """The same keys at other positions: what is stored does not change, what is read is turned."""
    x_BKSD = low_rank_blocks(1)
    codec = latent_keys()
    gaps_S = torch.arange(SHAPE.num_tokens) ** 2
    places = positions_of(x_BKSD), positions_of(x_BKSD) + 5_000 + gaps_S
    turned = [TURN.apply(x_BKSD, positions_BS) for positions_BS in places]

    near, far = (codec.encode(x, place)[0].float() for x, place in zip(turned, places, strict=True))

    # One unit in the last place of a float16 below 8, where the float32 angle rounds otherwise.
    torch.testing.assert_close(near, far, atol=2**-8, rtol=0)
    assert relative_error(codec.decode((far.half(),), places[1]), turned[1]) < 0.002


def test_values_may_be_expanded_after_the_weighted_sum() -> None:
    x_BKSD = low_rank_blocks(1)
    codec = latent_values(rank=8, bits=4)
    planes = codec.encode(x_BKSD, positions_of(x_BKSD))
    logits_THS = torch.randn(5, 6, SHAPE.num_tokens, generator=torch.Generator().manual_seed(0))
    weights_THS = logits_THS.softmax(-1)

    v_KSD = codec.decode(planes, positions_of(x_BKSD))[0]
    own_THD = torch.einsum("ths,hsd->thd", weights_THS, v_KSD.repeat_interleave(2, dim=0))
    latent_SC = codec.inner(planes, positions_of(x_BKSD))[0, 0]
    out_THD = codec.expand(torch.einsum("ths,sc->thc", weights_THS, latent_SC))

    # Float32 sums of values around 5 in another order.
    torch.testing.assert_close(out_THD, own_THD, atol=2e-5, rtol=1e-5)


def test_four_bits_at_a_third_of_the_width_are_ten_times_smaller_than_bfloat16() -> None:
    stored = sum(plane.num_bytes for plane in latent_keys(bits=4, scale_bits=8).planes(SHAPE))

    # 16 latents of 4 bits and a scale and zero of 8 bits each for 16 tokens, for 48 * 16 bits.
    latents, scales, unit = 32 * 16 // 2, 2 * 2 * 16, 4
    assert stored == latents + scales + unit
    assert math.prod(SHAPE) * 2 / stored > 9


@pytest.mark.parametrize("shape", [BlockShape(3, 32, 8), BlockShape(2, 32, 24)])
def test_blocks_of_another_shape_than_the_basis_are_refused(shape: BlockShape) -> None:
    with pytest.raises(ValueError, match="this basis is of 3 heads of 16 channels"):
        latent_keys().planes(shape)
    with pytest.raises(ValueError, match="this basis is of 3 heads of 16 channels"):
        latent_keys().encode(torch.zeros(1, *shape), torch.arange(shape.num_tokens)[None])


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_a_rank_that_the_basis_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank: want 1 to 48"):
        latent_values(rank)


def test_a_rank_that_does_not_fill_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        latent_keys(rank=12, bits=3).planes(SHAPE)


def test_bits_that_are_not_offered_are_refused() -> None:
    assert 5 not in CODE_BITS
    with pytest.raises(ValueError, match="bits"):
        latent_keys(bits=5)


def test_heads_that_do_not_divide_the_basis_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide into 5 heads"):
        LatentValues(VALUES, num_heads=5, rank=8)
