"""Pooled heads are stored as their codec would store one head, in the groups that lose least.

Shape letters: B blocks, T tokens, K KV heads, P pooled heads, S tokens of a block, D head
dimension.
"""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, consecutive
from kvcluster.codec.calibration import Calibration, read_calibration, write_calibration
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.codec.moments import MomentSums, Spread
from kvcluster.codec.pooled import HeadGroups, HeadPools, PooledHeads, fit_pools, neighbours
from kvcluster.errors import InvalidField
from kvcluster.model.rotary import Pairing, Rotary
from kvcluster.types import LayerGeometry, ModelSpec
from tests.codec_models import CPU, calibrated_codecs, calibration_of, plain_codecs
from tests.unit.codec.test_array_codecs import ARRAY_CODECS
from tests.unit.quality.toys import spec_of

NUM_HEADS, DIM = 6, 16
SHAPE = BlockShape(NUM_HEADS, 32, DIM)
FLOATS = ExactArray(torch.float32)
GROUPS = HeadGroups((0, 1, 1, 0, 2, 1), (1.0, 0.5, -2.0, 0.25, 3.0, 1.5))


def random_blocks(num_blocks: int, seed: int = 0) -> Tensor:
    return torch.randn(num_blocks, *SHAPE, generator=torch.Generator().manual_seed(seed))


def positions_of(x_BKSD: Tensor) -> Tensor:
    return consecutive(torch.arange(len(x_BKSD)) * x_BKSD.shape[2], x_BKSD.shape[2])


def decoded(codec: ArrayCodec, x_BKSD: Tensor) -> Tensor:
    return codec.decode(codec.encode(x_BKSD, positions_of(x_BKSD)), positions_of(x_BKSD))


def as_bytes(planes: tuple[Tensor, ...]) -> list[bytes]:
    return [plane.view(torch.uint8).numpy().tobytes() for plane in planes]


@pytest.fixture(params=sorted(ARRAY_CODECS))
def stored(request: pytest.FixtureRequest) -> ArrayCodec:
    return ARRAY_CODECS[request.param][0]


@pytest.mark.parametrize("heads", [GROUPS, neighbours(NUM_HEADS, 2)], ids=["scaled", "equal"])
def test_a_group_is_stored_as_its_codec_stores_one_head(
    stored: ArrayCodec, heads: HeadGroups
) -> None:
    x_BKSD = random_blocks(3)
    pooled_BPSD = torch.zeros(3, heads.num_pooled, SHAPE.num_tokens, DIM)
    for head, (group, scale) in enumerate(zip(heads.group_of, heads.scales, strict=True)):
        members = zip(heads.group_of, heads.scales, strict=True)
        total = sum(s**2 for p, s in members if p == group)
        pooled_BPSD[:, group] += x_BKSD[:, head] * (scale / total)

    codec = PooledHeads(stored, heads)

    planes = codec.encode(x_BKSD, positions_of(x_BKSD))
    assert as_bytes(planes) == as_bytes(stored.encode(pooled_BPSD, positions_of(x_BKSD)))
    read_BPSD = decoded(stored, pooled_BPSD)
    for head, (group, scale) in enumerate(zip(heads.group_of, heads.scales, strict=True)):
        expected = read_BPSD[:, group] * torch.tensor(scale)
        assert torch.equal(decoded(codec, x_BKSD)[:, head], expected)


def test_the_announced_planes_are_those_of_the_pooled_heads(stored: ArrayCodec) -> None:
    codec = PooledHeads(stored, GROUPS)

    assert codec.planes(SHAPE) == stored.planes(SHAPE._replace(num_heads=3))
    x_BKSD = random_blocks(2)
    encoded = codec.encode(x_BKSD, positions_of(x_BKSD))
    assert [((2, *plane.shape), plane.dtype) for plane in codec.planes(SHAPE)] == [
        (plane.shape, plane.dtype) for plane in encoded
    ]


def test_a_block_has_the_same_bytes_alone_and_among_others(stored: ArrayCodec) -> None:
    codec = PooledHeads(stored, GROUPS)
    x_BKSD = torch.cat([random_blocks(4), torch.zeros(1, *SHAPE), random_blocks(1) * 3e38])
    positions_BS = positions_of(x_BKSD)

    together = codec.encode(x_BKSD, positions_BS)

    for i in range(len(x_BKSD)):
        alone = codec.encode(x_BKSD[i : i + 1], positions_BS[i : i + 1])
        assert as_bytes(alone) == as_bytes(tuple(plane[i : i + 1] for plane in together))


def test_finite_numbers_never_become_nan_or_infinite(stored: ArrayCodec) -> None:
    codec = PooledHeads(stored, GROUPS)

    for magnitude in (0.0, 1e-42, 65504.0, 3e38):
        assert decoded(codec, torch.full((1, *SHAPE), magnitude)).isfinite().all()


def test_decoded_blocks_are_contiguous_float32_of_their_own(stored: ArrayCodec) -> None:
    codec = PooledHeads(stored, GROUPS)
    x_BKSD = random_blocks(2).to(torch.bfloat16).transpose(2, 3).contiguous().transpose(2, 3)
    planes = codec.encode(x_BKSD, positions_of(x_BKSD))
    before = as_bytes(planes)

    read_BKSD = codec.decode(planes, positions_of(x_BKSD))

    assert read_BKSD.dtype == torch.float32
    assert read_BKSD.is_contiguous()
    read_BKSD.add_(1)
    assert as_bytes(planes) == before
    assert decoded(codec, random_blocks(0)).shape == (0, *SHAPE)


def test_averaged_heads_are_read_as_their_mean() -> None:
    x_BKSD = random_blocks(2)

    read_BKSD = decoded(PooledHeads(FLOATS, neighbours(NUM_HEADS, 2)), x_BKSD)

    for group in (slice(0, 3), slice(3, 6)):
        expected = x_BKSD[:, group].mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        # Three float32 numbers near 1 are added in another way.
        torch.testing.assert_close(read_BKSD[:, group], expected, rtol=0, atol=1e-6)


def test_heads_that_are_alike_up_to_their_scale_lose_nothing() -> None:
    base_BPSD = random_blocks(2)[:, :3]
    scales_K = torch.tensor(GROUPS.scales)[:, None, None]
    x_BKSD = base_BPSD[:, torch.tensor(GROUPS.group_of)] * scales_K

    torch.testing.assert_close(decoded(PooledHeads(FLOATS, GROUPS), x_BKSD), x_BKSD)


def test_pooling_rotated_keys_is_rotating_pooled_keys() -> None:
    rotary = Rotary(
        inverse_frequencies_F=100.0 ** -torch.linspace(0, 1, DIM // 2),
        scaling=1.0,
        first_dim=0,
        pairing=Pairing.HALF_SPLIT,
    )
    x_BKSD = random_blocks(2)
    positions_BS = positions_of(x_BKSD)
    codec = PooledHeads(FLOATS, GROUPS)

    pooled_after = decoded(codec, rotary.apply(x_BKSD, positions_BS))

    expected = rotary.apply(decoded(codec, x_BKSD), positions_BS)
    torch.testing.assert_close(pooled_after, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(pooled_after, decoded(codec, x_BKSD), atol=0.1)


def spread_of(x_TKD: Tensor) -> Spread:
    sums = MomentSums(x_TKD.shape[1], x_TKD.shape[2], x_TKD.shape[2])
    sums.add(x_TKD, x_TKD, x_TKD)
    return sums.moments().keys


def loss(heads: HeadGroups, x_TKD: Tensor) -> float:
    x_BKSD = x_TKD.transpose(0, 1)[None]
    read_BKSD = decoded(PooledHeads(FLOATS, heads), x_BKSD)
    return float((read_BKSD - x_BKSD).double().square().sum())


@settings(deadline=None, max_examples=25)
@given(data=st.data(), seed=st.integers(0, 999))
def test_groups_of_heads_alike_up_to_their_scale_are_recovered(
    data: st.DataObject, seed: int
) -> None:
    num_groups = data.draw(st.integers(1, NUM_HEADS))
    rest = st.lists(
        st.integers(0, num_groups - 1),
        min_size=NUM_HEADS - num_groups,
        max_size=NUM_HEADS - num_groups,
    )
    group_of = data.draw(st.permutations([*range(num_groups), *data.draw(rest)]))
    generator = torch.Generator().manual_seed(seed)
    base_TPD = torch.randn(60, num_groups, DIM, generator=generator) + 1
    scales_K = (0.5 + torch.rand(NUM_HEADS, generator=generator)) * torch.tensor([1, -1, 1] * 2)
    x_TKD = base_TPD[:, torch.tensor(group_of)] * scales_K[:, None]

    found = fit_pools(spread_of(x_TKD), NUM_HEADS).of(num_groups)

    together = {tuple(p == q for q in group_of) for p in group_of}
    assert {tuple(p == q for q in found.group_of) for p in found.group_of} == together
    read_BKSD = decoded(PooledHeads(FLOATS, found), x_TKD.transpose(0, 1)[None])
    # Scales are float32, of numbers up to 10.
    torch.testing.assert_close(read_BKSD[0].transpose(0, 1), x_TKD, rtol=0, atol=2e-5)


def correlated_heads(seed: int) -> Tensor:
    """Heads that share some of what they say, around a mean."""
    generator = torch.Generator().manual_seed(seed)
    shared_TPD = torch.randn(300, 2, DIM, generator=generator) + 0.5
    mix_PK = torch.randn(2, NUM_HEADS, generator=generator)
    own_TKD = torch.randn(300, NUM_HEADS, DIM, generator=generator)
    return torch.einsum("tpd,pk->tkd", shared_TPD, mix_PK) + 0.3 * own_TKD


@pytest.mark.parametrize("seed", range(4))
def test_fitted_scales_are_the_best_for_their_groups(seed: int) -> None:
    x_TKD = correlated_heads(seed)
    found = fit_pools(spread_of(x_TKD), NUM_HEADS).of(2)
    best = loss(found, x_TKD)
    generator = torch.Generator().manual_seed(seed)

    for _ in range(5):
        moved = [s + 0.05 * torch.randn((), generator=generator).item() for s in found.scales]
        assert loss(replace(found, scales=tuple(moved)), x_TKD) > best


@pytest.mark.parametrize("seed", range(4))
def test_more_groups_lose_less_and_one_for_each_head_loses_nothing(seed: int) -> None:
    x_TKD = correlated_heads(seed)
    pools = fit_pools(spread_of(x_TKD), NUM_HEADS)

    losses = [loss(pools.of(number), x_TKD) for number in range(1, NUM_HEADS + 1)]

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
    assert losses[0] < loss(neighbours(NUM_HEADS, 1), x_TKD)


def test_groups_do_not_depend_on_how_keys_are_turned() -> None:
    x_TKD = correlated_heads(0)
    turn_DD, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)))

    plain = fit_pools(spread_of(x_TKD), NUM_HEADS)
    turned = fit_pools(spread_of(x_TKD @ turn_DD), NUM_HEADS)

    assert torch.equal(plain.groups_NK, turned.groups_NK)
    torch.testing.assert_close(plain.scales_NK, turned.scales_NK)


def test_heads_that_are_always_zero_are_read_as_zero() -> None:
    found = fit_pools(spread_of(torch.zeros(40, 3, 4)), 3).of(1)

    assert found == HeadGroups((0, 0, 0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("group_of", "scales"),
    [
        ((), ()),
        ((0, 2), (1.0, 1.0)),
        ((1, 1), (1.0, 1.0)),
        ((0, 1), (1.0, 0.0)),
        ((0, 0), (1.0, float("inf"))),
        ((0, 0), (1.0,)),
    ],
)
def test_groups_that_cannot_be_are_refused(
    group_of: tuple[int, ...], scales: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        HeadGroups(group_of, scales)


def test_blocks_and_planes_of_other_heads_are_refused() -> None:
    codec = PooledHeads(FLOATS, GROUPS)
    four_BPSD = torch.zeros(1, 4, 32, DIM)

    with pytest.raises(ValueError, match="groups are of 6 heads, not of 4"):
        codec.encode(four_BPSD, positions_of(four_BPSD))
    with pytest.raises(ValueError, match="want 3 pooled heads, got 4"):
        codec.decode((four_BPSD,), positions_of(four_BPSD))


@pytest.mark.parametrize("number", [0, 3])
def test_more_groups_than_heads_and_none_are_refused(number: int) -> None:
    pools = HeadPools(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))

    with pytest.raises(ValueError, match=f"want 1 to 2 groups, got {number}"):
        pools.of(number)


def model(*num_kv_heads: int) -> ModelSpec:
    return spec_of(
        *(
            LayerGeometry(
                num_query_heads=12, num_kv_heads=heads, key_dim=16, value_dim=16, scale=0.25
            )
            for heads in num_kv_heads
        )
    )


@pytest.mark.parametrize(
    ("heads", "storage", "reason"),
    [
        ((1, 1), "pooled + int4", "heads=1 pools nothing, .* more than 1 KV head$"),
        ((4, 4), "pooled:heads=4 + int4", "heads=4 pools nothing, .* more than 4 KV heads$"),
        ((3, 3), "pooled:heads=2 + int8", "take a divisor of 3, or by=learned"),
        ((4, 4), "pooled + latent", "latents choose their directions across all heads"),
        ((4, 4), "pooled + latent:values=int4", "latents choose their directions"),
    ],
)
def test_what_a_model_cannot_pool_is_refused_with_the_reason(
    heads: tuple[int, ...], storage: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        calibrated_codecs(model(*heads)).layers(storage)


def without_pools(calibration: Calibration) -> Calibration:
    layers = tuple(replace(layer, pools=None) for layer in calibration.layers)
    return replace(calibration, layers=layers)


def test_learned_groups_need_a_calibration_that_has_them() -> None:
    spec = model(4)
    older = CodecModel(spec=spec, device=CPU, calibration=without_pools(calibration_of(spec)))

    with pytest.raises(ValueError, match="by=learned needs a calibration file"):
        plain_codecs(spec).layers("pooled:by=learned + int4")
    with pytest.raises(ValueError, match="by=learned needs a newer calibration file"):
        ModelCodecs(older).layers("pooled:by=learned + int4")


@pytest.mark.parametrize("storage", ["pooled + int5", "pooled:heads=0", "pooled:by=luck + int4"])
def test_text_that_names_no_storage_is_refused(storage: str) -> None:
    with pytest.raises(InvalidField):
        plain_codecs(model(4)).layers(storage)


def test_layers_with_few_heads_are_left_as_they_are() -> None:
    single, four = plain_codecs(model(1, 4)).layers("pooled + int4")
    plain, _ = plain_codecs(model(1, 4)).layers("int4")

    assert single == plain
    assert four.keys == PooledHeads(plain.keys, neighbours(4, 1))
    assert four.values == PooledHeads(plain.values, neighbours(4, 1))


@pytest.mark.parametrize("codec", ["exact", "int8", "int4"])
def test_a_block_takes_the_share_of_the_heads_that_are_left(codec: str) -> None:
    spec = model(4)
    shape = BlockShape(4, 64, 16)
    plain = plain_codecs(spec).layers(codec)[0]

    def num_bytes(codec: ArrayCodec) -> int:
        return sum(plane.num_bytes for plane in codec.planes(shape))

    for heads in (1, 2):
        pooled = plain_codecs(spec).layers(f"pooled:heads={heads} + {codec}")[0]
        assert num_bytes(pooled.keys) * 4 == num_bytes(plain.keys) * heads
        assert num_bytes(pooled.values) * 4 == num_bytes(plain.values) * heads


def test_keys_and_values_have_the_groups_of_the_calibration() -> None:
    spec = model(4, 4)
    pools = [layer.pools for layer in calibration_of(spec).layers]

    codecs = calibrated_codecs(spec).layers("pooled:heads=3,by=learned + int8")

    for codec, fitted in zip(codecs, pools, strict=True):
        assert fitted is not None
        assert isinstance(codec.keys, PooledHeads)
        assert isinstance(codec.values, PooledHeads)
        assert codec.keys.heads == fitted.keys.of(3)
        assert codec.values.heads == fitted.values.of(3)
        assert codec.keys.heads != codec.values.heads


def test_a_file_gives_back_the_groups_and_may_be_without(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(model(4, 2), weights_digest="w")
    calibration = calibration_of(spec)
    write_calibration(tmp_path / "with", calibration)
    write_calibration(tmp_path / "without", without_pools(calibration))

    read = read_calibration(tmp_path / "with", "w")
    older = read_calibration(tmp_path / "without", "w")

    for layer, expected in zip(read.layers, calibration.layers, strict=True):
        assert layer.pools is not None
        assert expected.pools is not None
        for pools, written in (
            (layer.pools.keys, expected.pools.keys),
            (layer.pools.values, expected.pools.values),
        ):
            assert torch.equal(pools.groups_NK, written.groups_NK)
            assert torch.equal(pools.scales_NK, written.scales_NK)
    assert all(layer.pools is None for layer in older.layers)
