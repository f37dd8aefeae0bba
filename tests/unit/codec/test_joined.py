"""Layers that share a latent read it as if it were their own, and it is stored once."""

import pytest
import torch
from torch import Tensor

from kvcluster.cache.encoded_pages import group_layout, held_planes
from kvcluster.codec.array import BlockShape
from kvcluster.codec.inner import InnerKeys, InnerValues
from kvcluster.codec.joined import (
    JoinedKeys,
    JoinedValues,
    encode_together,
    layer_groups,
    member_of,
)
from kvcluster.codec.latent import LatentKeys
from kvcluster.codec.method import CodecModel, LayerCodec
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.types import ModelSpec
from tests.codec_models import CPU, calibrated_codecs, calibration_of, plain_codecs
from tests.scripted_model import ScriptedModel, geometry, latent_geometry

SIZE, HEADS, DIM = 16, 2, 16
SPEC = ScriptedModel(
    geometry(), geometry(), geometry(), geometry(window=24), geometry(window=24), max_tokens=1
).spec
CODECS = calibrated_codecs(SPEC)
SHAPE = BlockShape(HEADS, SIZE, DIM)


def blocks(num_layers: int, num_blocks: int = 3) -> tuple[list[list[Tensor]], Tensor]:
    """Keys and values of each layer, and positions."""
    generator = torch.Generator().manual_seed(0)
    arrays = [
        [torch.randn(num_blocks, HEADS, SIZE, DIM, generator=generator) for _ in "kv"]
        for _ in range(num_layers)
    ]
    return arrays, torch.arange(num_blocks * SIZE).reshape(num_blocks, SIZE) + 50


def group(storage: str, layers: range) -> list[LayerCodec]:
    return list(CODECS.layers(storage)[layers.start : layers.stop])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [(0,), (1,), (2,), (3,), (4,)]),
        (2, [(0, 1), (2,), (3, 4)]),
        (3, [(0, 1, 2), (3, 4)]),
        (8, [(0, 1, 2), (3, 4)]),
    ],
)
def test_groups_are_neighbours_of_one_shape_and_window(
    size: int, expected: list[tuple[int, ...]]
) -> None:
    assert [tuple(found) for found in layer_groups(SPEC.layers, size)] == expected


@pytest.mark.parametrize("bits", [16, 8, 4, 3])
@pytest.mark.parametrize("array", [0, 1])
def test_each_layer_reads_its_heads_of_the_whole_to_the_last_bit(bits: int, array: int) -> None:
    codecs = group(f"latent:r=0.25,bits={bits},group=16,layers=3", range(3))
    written, positions_BS = blocks(3)

    held = encode_together(
        [[codec[array]] for codec in codecs], [[layer[array]] for layer in written], positions_BS
    )

    member = member_of(codecs[0][array])
    assert member is not None
    assert [len(planes) for planes in held[1:]] == [0, 0]
    whole = member.whole.decode(held[0], positions_BS).chunk(3, dim=1)
    for codec, expected_BKSD in zip(codecs, whole, strict=True):
        assert torch.equal(codec[array].decode(held[0], positions_BS), expected_BKSD)


def test_a_latent_of_all_directions_gives_every_layer_back() -> None:
    codecs = group("latent:r=1,layers=3", range(3))
    written, positions_BS = blocks(3)

    held = encode_together(codecs, written, positions_BS)

    keys, values = held[0]
    for codec, (k_BKSD, v_BKSD) in zip(codecs, written, strict=True):
        for array, plane, x_BKSD in ((codec.keys, keys, k_BKSD), (codec.values, values, v_BKSD)):
            # Latents are float16 of unit variance, and a basis scales directions by up to 1e3.
            error = (array.decode([plane], positions_BS) - x_BKSD).norm() / x_BKSD.norm()
            assert error < 2e-3


def test_what_a_layer_reads_in_its_inner_form_is_what_it_decodes() -> None:
    codecs = group("latent:r=0.5,bits=8,group=16,layers=2", range(2))
    written, positions_BS = blocks(2)
    k_planes, v_planes = (
        encode_together(
            [[codec[array]] for codec in codecs],
            [[layer[array]] for layer in written],
            positions_BS,
        )[0]
        for array in (0, 1)
    )
    codec = codecs[1]
    assert isinstance(codec.keys, InnerKeys)
    assert isinstance(codec.values, InnerValues)

    inner_BKSD = codec.keys.inner(k_planes, positions_BS)
    latent_B1SC = codec.values.inner(v_planes, positions_BS)
    expanded_THD = codec.values.expand(latent_B1SC[0, 0, :, None].expand(-1, 2 * HEADS, -1))

    # Both sum float32 numbers near 1 over 32 directions.
    torch.testing.assert_close(
        inner_BKSD, codec.keys.decode(k_planes, positions_BS), rtol=0, atol=1e-4
    )
    v_KSD = codec.values.decode(v_planes, positions_BS)[0]
    torch.testing.assert_close(expanded_THD[:, ::2].transpose(0, 1), v_KSD, rtol=0, atol=1e-4)


def test_a_layer_is_not_written_without_the_others() -> None:
    written, positions_BS = blocks(1)

    for array, x_BKSD in zip(CODECS.layers("latent:layers=2")[0], written[0], strict=True):
        with pytest.raises(ValueError, match="blocks of 2 layers are written together"):
            array.encode(x_BKSD, positions_BS)


def test_planes_of_a_group_are_stored_once() -> None:
    codecs = CODECS.layers("latent:r=0.25,bits=8,layers=2")

    held = [
        sum(plane.num_bytes for plane in held_planes(codec, layer, SIZE))
        for codec, layer in zip(codecs, SPEC.layers, strict=True)
    ]

    # A quarter of 2 * 32 numbers, one byte each, and float16 scale and zero for the 16 tokens.
    of_two = 2 * (16 * SIZE + 16 * 4)
    assert held == [of_two, 0, of_two // 2, of_two, 0]


def test_a_page_holds_as_many_blocks_as_without_groups_where_bytes_are_equal() -> None:
    alone, together = (
        group_layout(SPEC, 0, CODECS.layers(f"latent:r=0.25{layers}"), SIZE).blocks_per_page
        for layers in ("", ",layers=3")
    )

    assert alone == together


def test_values_alone_are_shared_where_keys_are_written_otherwise() -> None:
    codecs = CODECS.layers("latent:r=0.5,keys=int4,layers=2")

    assert [isinstance(codec.values, JoinedValues) for codec in codecs] == [
        *(True, True, False),
        *(True, True),
    ]
    assert not any(isinstance(codec.keys, LatentKeys) for codec in codecs)


def test_layers_with_a_window_may_be_written_otherwise() -> None:
    codecs = CODECS.layers("latent:windowed=int8,layers=3")

    assert [isinstance(codec.keys, JoinedKeys) for codec in codecs] == [
        *(True, True, True),
        *(False, False),
    ]


@pytest.mark.parametrize(
    ("storage", "recent_blocks", "step"),
    [("latent:layers=2", 4, 4), ("latent:layers=2", 0, 1), ("latent", 4, None), ("exact", 4, None)],
)
def test_blocks_of_several_layers_are_encoded_as_many_at_a_time_as_are_recent(
    storage: str, recent_blocks: int, step: int | None
) -> None:
    assert CODECS.encoded_step(storage, recent_blocks) == step


SEPARATE = ScriptedModel(geometry(), geometry(window=24), geometry(), max_tokens=1).spec
EXPANDED = ScriptedModel(latent_geometry(), latent_geometry(), max_tokens=1).spec


def without_groups(spec: ModelSpec) -> ModelCodecs:
    calibration = calibration_of(spec)
    fewer = type(calibration)(
        weights_digest="", text_digests=(), num_tokens=1, layers=calibration.layers
    )
    return ModelCodecs(CodecModel(spec=spec, device=CPU, calibration=fewer))


@pytest.mark.parametrize(
    ("codecs", "storage", "reason"),
    [
        (calibrated_codecs(SEPARATE), "latent:layers=2", "layers=2 puts no layers together"),
        (CODECS, "latent:keys=int4,values=int4,layers=2", "layers=2 puts no layers together"),
        (without_groups(SPEC), "latent:layers=2", "kvcluster calibrate --layers 2"),
        (plain_codecs(SPEC), "latent:layers=2", "need a calibration file"),
        (plain_codecs(EXPANDED), "latent:layers=2", "the model's own latent already"),
        (CODECS, "pooled + latent:layers=2", "pool the heads, or take a smaller r"),
    ],
)
def test_what_cannot_be_put_together_is_refused(
    codecs: ModelCodecs, storage: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        codecs.layers(storage)
