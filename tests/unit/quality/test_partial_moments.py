"""What an unfinished calibration leaves is gone on with, or refused: never mixed with others."""

from pathlib import Path

import pytest
import torch

from kvcluster.errors import CalibrationMismatch
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibrating import (
    CalibrationText,
    ModelMoments,
    add_text,
    checked_rotaries,
)
from kvcluster.quality.partial_moments import PartialMoments
from tests.unit.quality.toys import tiny_model

TEXT = CalibrationText("data.1", tuple(range(3, 103)))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture
def partial(tmp_path: Path) -> PartialMoments:
    return PartialMoments(tmp_path / "file.safetensors", "digest")


@pytest.fixture(scope="module")
def moments(model: LoadedModel) -> ModelMoments:
    found = ModelMoments(model.spec)
    add_text(model, checked_rotaries(model), found, TEXT)
    return found


def test_moments_are_read_back_as_they_were(
    model: LoadedModel, partial: PartialMoments, moments: ModelMoments
) -> None:
    partial.save(moments)
    found = ModelMoments(model.spec)

    partial.load_into(found, [TEXT.digest, "another"])

    assert found.text_digests == moments.text_digests
    assert found.tensors().keys() == moments.tensors().keys()
    assert all(torch.equal(x, moments.tensors()[name]) for name, x in found.tensors().items())
    assert [path.name for path in partial.path.parent.iterdir()] == [
        "file.safetensors.partial.safetensors"
    ]


def test_without_a_file_nothing_is_added(model: LoadedModel, partial: PartialMoments) -> None:
    found = ModelMoments(model.spec)

    partial.load_into(found, [TEXT.digest])

    assert found.text_digests == ()
    assert found.tensors() == {}


def test_a_file_of_another_model_is_refused(
    model: LoadedModel, partial: PartialMoments, moments: ModelMoments
) -> None:
    partial.save(moments)
    other = PartialMoments(partial.path.with_name("file.safetensors"), "other digest")

    with pytest.raises(CalibrationMismatch, match=r"another model: remove it"):
        other.load_into(ModelMoments(model.spec), [TEXT.digest])


def test_a_file_of_other_texts_is_refused(
    model: LoadedModel, partial: PartialMoments, moments: ModelMoments
) -> None:
    partial.save(moments)

    with pytest.raises(CalibrationMismatch, match="other texts"):
        partial.load_into(ModelMoments(model.spec), ["another"])


def test_a_file_of_other_layers_is_refused(partial: PartialMoments, moments: ModelMoments) -> None:
    partial.save(moments)

    with pytest.raises(CalibrationMismatch, match="damaged"):
        partial.load_into(ModelMoments(tiny_model("qwen3").spec), [TEXT.digest])


@pytest.mark.parametrize("num_bytes", [0, 7, 500, -9])
def test_a_truncated_file_is_refused(
    model: LoadedModel, partial: PartialMoments, moments: ModelMoments, num_bytes: int
) -> None:
    partial.save(moments)
    partial.path.write_bytes(partial.path.read_bytes()[:num_bytes])

    with pytest.raises(CalibrationMismatch, match="cannot be read"):
        partial.load_into(ModelMoments(model.spec), [TEXT.digest])
