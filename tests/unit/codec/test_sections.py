"""Heads cut into sections are written as each section alone.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

import pytest
import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, consecutive
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.codec.quantized import ChannelQuantizer
from kvcluster.codec.rotated import Rotated
from kvcluster.codec.sections import Sections, powers_of_two
from kvcluster.types import LayerGeometry
from tests.unit.quality.toys import spec_of

POSITIONS_BS = consecutive(torch.tensor([0, 64, 640]), 32)


def blocks(dim: int) -> Tensor:
    return torch.randn(3, 2, 32, dim, generator=torch.Generator().manual_seed(dim))


CODECS: list[ArrayCodec] = [
    ExactArray(torch.float32),
    ChannelQuantizer(4),
    Rotated(3, centred=True),
    Rotated(2, transposed=True),
]


@pytest.mark.parametrize("dims", [(16,), (16, 8), (64, 16, 8)])
@pytest.mark.parametrize("codec", CODECS)
def test_a_section_has_the_bytes_that_it_has_alone(
    codec: ArrayCodec, dims: tuple[int, ...]
) -> None:
    x_BKSD = blocks(sum(dims))
    sections = Sections((codec,) * len(dims), dims)

    planes = sections.encode(x_BKSD, POSITIONS_BS)

    parts = torch.split(x_BKSD, dims, dim=-1)
    alone = [codec.encode(part, POSITIONS_BS) for part in parts]
    expected = [plane for encoded in alone for plane in encoded]
    assert [plane.dtype for plane in planes] == [plane.dtype for plane in expected]
    assert all(map(torch.equal, planes, expected))
    decoded = torch.cat([codec.decode(encoded, POSITIONS_BS) for encoded in alone], dim=-1)
    assert torch.equal(sections.decode(planes, POSITIONS_BS), decoded)


@pytest.mark.parametrize("codec", CODECS)
def test_the_planes_are_those_declared_and_have_names_of_their_own(codec: ArrayCodec) -> None:
    sections = Sections((codec, codec), (16, 8))

    declared = sections.planes(BlockShape(2, 32, 24))

    planes = sections.encode(blocks(24), POSITIONS_BS)
    assert [((3, *plane.shape), plane.dtype) for plane in declared] == [
        (plane.shape, plane.dtype) for plane in planes
    ]
    assert all(plane.is_contiguous() for plane in planes)
    assert len({plane.name for plane in declared}) == len(declared)


def test_sections_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 24, not 32"):
        Sections((Rotated(4), Rotated(4)), (16, 8)).planes(BlockShape(1, 32, 32))


def test_a_plane_too_few_is_refused() -> None:
    sections = Sections((Rotated(4), Rotated(4)), (16, 8))
    planes = sections.encode(blocks(24), POSITIONS_BS)

    with pytest.raises(ValueError, match="have 4 planes, not 3"):
        sections.decode(planes[:-1], POSITIONS_BS)


@pytest.mark.parametrize(
    ("number", "powers"), [(64, (64,)), (576, (512, 64)), (24, (16, 8)), (448, (256, 128, 64))]
)
def test_a_number_is_the_sum_of_its_powers_of_two(number: int, powers: tuple[int, ...]) -> None:
    assert powers_of_two(number) == powers


def rotated_codecs(key_dim: int, value_dim: int, *, values_in_keys: bool) -> ModelCodecs:
    layer = LayerGeometry(
        num_query_heads=4,
        num_kv_heads=1,
        key_dim=key_dim,
        value_dim=value_dim,
        scale=1.0,
        values_in_keys=values_in_keys,
    )
    return ModelCodecs(CodecModel(spec=spec_of(layer), device=torch.device("cpu")))


def test_latent_and_rotary_key_of_deepseek_are_rotated_apart() -> None:
    [layer] = rotated_codecs(576, 512, values_in_keys=True).layers("rotated4")

    planes = layer.keys.planes(BlockShape(1, 64, 576))

    # Codes, the mean of each channel, and for each token a scale of the latent and of the key.
    assert sum(plane.num_bytes for plane in planes) == 64 * 576 // 2 + 2 * 576 + 2 * 2 * 64


def test_a_head_of_a_power_of_two_is_rotated_in_one_piece() -> None:
    [layer] = rotated_codecs(128, 96, values_in_keys=False).layers("rotated3")

    assert layer.keys == Rotated(3, centred=True)
    assert layer.values == Sections((Rotated(3, transposed=True),) * 2, (64, 32))


@pytest.mark.parametrize("dims", [(12, 16), (16, 12)])
def test_a_head_that_is_no_multiple_of_eight_is_refused(dims: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 8, not 12"):
        rotated_codecs(*dims, values_in_keys=False).layers("rotated4")
