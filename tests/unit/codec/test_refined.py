"""Refined bases are kept beside the fitted ones, and serve the codec that they are for alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcluster.codec.basis import Basis
from kvcluster.codec.calibration import (
    Calibration,
    bases_digest,
    read_calibration,
    write_calibration,
)
from kvcluster.codec.joined import JoinedKeys, JoinedValues
from kvcluster.codec.latent import LatentKeys, LatentValues
from kvcluster.codec.latent_method import trained_as
from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.codec.refined import Array, RefinedBasis
from kvcluster.codec.registry import CODEC_METHODS
from kvcluster.policy import parse_choice
from kvcluster.types import LayerGeometry
from tests.codec_models import CPU, calibration_of
from tests.unit.quality.toys import spec_of

GEOMETRY = LayerGeometry(num_query_heads=2, num_kv_heads=2, key_dim=16, value_dim=16, scale=1)
SPEC = spec_of(*[GEOMETRY] * 5)
POLICY = "latent:r=0.25,value_r=0.5,bits=4,layers=2"
GROUPS = (range(2), range(2, 4))
ALONE = range(4, 5)


def name_of(policy: str) -> str:
    return trained_as(parse_choice(policy, CODEC_METHODS).arguments)


def moved(basis: Basis, rank: int) -> Basis:
    prefix = basis.prefix(rank)
    return replace(
        prefix,
        mean_F=prefix.mean_F + 1,
        down_FC=prefix.down_FC + 1,
        up_CF=prefix.up_CF - 1,
    )


def refined_calibration() -> Calibration:
    """Of the two groups, and of the layer that is left over."""
    calibration = calibration_of(SPEC)
    fitted = {group.layers: group for group in calibration.groups if group.layers in GROUPS}
    units = {layers: (group.keys, group.values) for layers, group in fitted.items()}
    units[ALONE] = (calibration.layers[4].keys, calibration.layers[4].values)
    ranks: dict[Array, float] = {"keys": 0.25, "values": 0.5}
    return replace(
        calibration,
        refined=tuple(
            RefinedBasis(
                codec=name_of(POLICY),
                layers=layers,
                array=array,
                basis=moved(basis, round(share * len(basis.mean_F))),
            )
            for layers, arrays in units.items()
            for (array, share), basis in zip(ranks.items(), arrays, strict=True)
        ),
    )


def codecs_of(calibration: Calibration) -> ModelCodecs:
    rotations = [None] * len(SPEC.layers)
    return ModelCodecs(
        CodecModel(spec=SPEC, device=CPU, calibration=calibration, rotations=rotations)
    )


def down_sums(calibration: Calibration, policy: str) -> list[float]:
    """Tells the bases of all arrays of all layers apart."""
    sums = []
    for layer in codecs_of(calibration).layers(policy):
        for codec in layer:
            whole = codec.member.whole if isinstance(codec, JoinedKeys | JoinedValues) else codec
            assert isinstance(whole, LatentKeys | LatentValues)
            written = whole.unrotated if isinstance(whole, LatentKeys) else whole
            sums.append(float(written.basis.down_FC.sum()))
    return sums


def test_a_file_gives_back_refined_bases_as_they_were_written(tmp_path: Path) -> None:
    calibration = refined_calibration()
    path = tmp_path / "file"
    write_calibration(path, calibration)

    found = read_calibration(path, calibration.weights_digest)

    expected = {(each.codec, *each.unit): each.basis for each in calibration.refined}
    assert {(each.codec, *each.unit) for each in found.refined} == set(expected)
    for each in found.refined:
        basis = expected[each.codec, *each.unit]
        for name in ("mean_F", "down_FC", "up_CF", "spectrum_F"):
            assert torch.equal(getattr(each.basis, name), getattr(basis, name))
    assert bases_digest(found) == bases_digest(calibration)


def test_a_file_without_refined_bases_is_read(tmp_path: Path) -> None:
    calibration = calibration_of(SPEC)
    write_calibration(tmp_path / "file", calibration)

    assert read_calibration(tmp_path / "file", calibration.weights_digest).refined == ()


def test_refined_bases_are_part_of_what_bases_are_told_apart_by() -> None:
    assert bases_digest(refined_calibration()) != bases_digest(calibration_of(SPEC))


@pytest.mark.parametrize(
    "policy", [POLICY, f"{POLICY},windowed=int8", "latent:layers=2,bits=4,value_r=0.5"]
)
def test_the_codec_that_they_are_for_has_them(policy: str) -> None:
    refined = down_sums(refined_calibration(), policy)

    fitted = down_sums(calibration_of(SPEC), policy)
    assert all(one != other for one, other in zip(refined, fitted, strict=True))


@pytest.mark.parametrize(
    "policy",
    [
        "latent:r=0.25,value_r=0.5,bits=4",
        "latent:r=0.25,value_r=0.5,bits=8,layers=2",
        "latent:r=0.25,value_r=0.5,bits=4,layers=2,scale_bits=8",
        "latent:r=0.5,value_r=0.5,bits=4,layers=2",
        "latent:r=0.25,value_r=0.25,bits=4,layers=2",
        "latent:r=0.25,value_r=0.5,bits=4,layers=2,codes=rotated",
        "latent:r=0.25,value_r=0.5,bits=4,layers=3",
    ],
)
def test_other_codecs_have_the_fitted_bases(policy: str) -> None:
    refined = down_sums(refined_calibration(), policy)

    assert refined == down_sums(calibration_of(SPEC), policy)
