"""A calibration trains bases for the codecs that it is told, and keeps what predicts better."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcluster.codec.calibration import fitted_bases, read_calibration
from kvcluster.codec.joined import JoinedKeys
from kvcluster.errors import CalibrationMismatch, ConfigError, InvalidField
from kvcluster.model.codecs import measured_table
from kvcluster.model.loader import LoadedModel
from kvcluster.policy_bounds import parse_bound, resolve
from kvcluster.quality.calibration_run import (
    CalibrationReport,
    CalibrationSettings,
    Progress,
    calibrate,
)
from kvcluster.quality.distillation import DistillationSettings
from kvcluster.quality.held_out import CHOICE_TEXTS
from kvcluster.quality.refining import codecs_to_refine, distillation_texts
from kvcluster.quality.served import codecs_of
from kvcluster.quality.texts import Purpose, Text
from tests.unit.quality.toys import character_tokenizer, tiny_model

PROSE = "Some words, one after another, and then some more of them. "
TEXTS = (
    Text(name="learned", purpose=Purpose.CALIBRATION, content=PROSE * 60),
    *(
        Text(name=name, purpose=Purpose.EVALUATION, content=f"{name}: {PROSE[::-1]}" * 40)
        for name in CHOICE_TEXTS
    ),
)
JOINED = "latent:r=0.5,bits=4,layers=3"
ALONE = "latent:r=0.5,bits=4,values=int4"
FAST = DistillationSettings(num_steps=4, learning_rate=1e-3, num_held_out=2, num_fisher=4)


class Interrupted(Exception):
    """The run ends here."""


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture
def settings(tmp_path: Path) -> CalibrationSettings:
    return CalibrationSettings(
        out=tmp_path / "tiny.safetensors",
        policies=("int4",),
        refine=(JOINED, ALONE),
        distillation=FAST,
        num_tokens=512,
        num_documents=0,
        block_size=16,
        exact_recent_tokens=16,
    )


def ignore(_stage: str, _done: int, _total: int) -> None: ...


def calibrated(
    model: LoadedModel, settings: CalibrationSettings, progress: Progress = ignore
) -> CalibrationReport:
    return calibrate(model, character_tokenizer(), TEXTS, settings, progress)


def test_the_file_has_bases_for_what_was_refined_and_the_report_says_what_it_gained(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    report = calibrated(model, settings)

    calibration = read_calibration(settings.out, model.spec.weights_digest)
    kept = {each.codec for each in report.refinements if each.is_kept}
    assert [each.codec for each in report.refinements] == [JOINED, ALONE]
    assert JOINED in kept
    assert {each.codec for each in calibration.refined} == kept
    assert {each.unit for each in calibration.refined if each.codec == JOINED} == {
        (range(3), "keys"),
        (range(3), "values"),
    }
    for each in report.refinements:
        assert each.is_kept == (each.divergence_after < each.divergence_before)


def test_what_was_refined_is_measured_with_its_refined_bases(
    model: LoadedModel, settings: CalibrationSettings, tmp_path: Path
) -> None:
    refined = calibrated(model, replace(settings, refine=(JOINED,)))
    fitted = calibrated(
        model,
        replace(settings, out=tmp_path / "fitted", refine=(), policies=("int4", JOINED)),
    )

    assert [recipe.policy for recipe in refined.recipes] == ["int4", JOINED]
    assert refined.recipes[0] == fitted.recipes[0]
    assert refined.recipes[1].ratio == fitted.recipes[1].ratio
    assert refined.recipes[1].perplexity_increase != fitted.recipes[1].perplexity_increase


def test_auto_may_choose_what_was_refined_and_is_served_with_its_bases(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    report = calibrated(model, replace(settings, policies=("exact",), refine=(JOINED,)))

    calibration = read_calibration(settings.out, model.spec.weights_digest)
    recipes = measured_table(calibration).recipes
    bound = parse_bound("auto: ratio>=1.5, recall>=0%")
    assert bound is not None
    chosen = resolve(bound, recipes)
    assert recipes == report.recipes
    assert chosen == JOINED
    layers = codecs_of(model, calibration).layers(chosen)
    [keys] = [each.basis for each in calibration.refined if each.array == "keys"]
    assert isinstance(layers[0].keys, JoinedKeys)
    assert torch.equal(layers[0].keys.basis.up_CF, keys.up_CF.chunk(len(layers), dim=1)[0])


def test_directions_of_all_bases_are_ordered_and_none_is_lost(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    calibrated(model, replace(settings, refine=(), joined=(2, 3), num_fisher=4))

    found = read_calibration(settings.out, model.spec.weights_digest)
    bases = fitted_bases(found.layers, found.groups)
    assert {layers for layers, _ in bases} == {
        range(1), range(1, 2), range(2, 3), range(2), range(3),
    }  # fmt: skip
    for basis in bases.values():
        width = len(basis.mean_F)
        assert (basis.spectrum_F[:-1] >= basis.spectrum_F[1:]).all()
        # Matrices whose condition, a few hundred, multiplies the rounding of float32.
        assert torch.allclose(basis.down_FC @ basis.up_CF, torch.eye(width), atol=1e-3)


def test_what_is_ordered_already_is_refined_from_there(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    report = calibrated(model, replace(settings, refine=(JOINED,), num_fisher=4))

    own = calibrated(model, replace(settings, refine=(JOINED,)))
    [from_ordered], [from_fitted] = report.refinements, own.refinements
    assert from_ordered.divergence_before < from_fitted.divergence_before


def test_a_run_that_was_broken_off_trains_what_it_had_not_finished(
    model: LoadedModel, settings: CalibrationSettings, tmp_path: Path
) -> None:
    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "refinement" and done == FAST.num_steps + 1:
            raise Interrupted

    steps: list[int] = []

    def note(stage: str, done: int, _total: int) -> None:
        if stage == "refinement":
            steps.append(done)

    with pytest.raises(Interrupted):
        calibrated(model, settings, interrupt)
    resumed = calibrated(model, settings, note)

    whole = calibrated(model, replace(settings, out=tmp_path / "whole"))
    assert min(steps) == FAST.num_steps
    assert resumed == whole
    assert settings.out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "refined" in path.name] == []


def test_what_was_trained_otherwise_is_not_taken_over(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "refinement" and done == FAST.num_steps + 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrated(model, settings, interrupt)

    with pytest.raises(CalibrationMismatch, match="remove it"):
        calibrated(model, replace(settings, distillation=replace(FAST, num_steps=5)))


@pytest.mark.parametrize(
    "policy", ["int4", "exact", "latent:keys=int4,values=int4", "int8 + window"]
)
def test_a_policy_without_latents_has_nothing_to_refine(
    model: LoadedModel, settings: CalibrationSettings, policy: str
) -> None:
    with pytest.raises(ConfigError, match="no bases to refine: want latents"):
        calibrated(model, replace(settings, refine=(policy,)))


def test_a_policy_that_is_none_is_refused(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    with pytest.raises(InvalidField, match="no method is called"):
        calibrated(model, replace(settings, refine=("latin",)))


def test_a_codec_that_the_model_cannot_have_is_refused_with_the_reason(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    with pytest.raises(ConfigError, match=r"codes=rotated: .* multiple of 8"):
        calibrated(model, replace(settings, refine=("latent:r=0.4,bits=4,codes=rotated",)))


def test_policies_that_write_latents_alike_are_refined_once() -> None:
    windowed = "latent:r=0.5,bits=8,windowed=int8 + window:recent=64"

    assert list(codecs_to_refine(["latent:bits=8,r=0.5", windowed])) == ["latent:r=0.5,bits=8"]


def test_a_quarter_of_what_is_trained_on_are_documents_with_needles() -> None:
    text = Text(name="long", purpose=Purpose.CALIBRATION, content=PROSE * 800)

    pieces = distillation_texts(
        character_tokenizer(), [text], (), num_tokens=3000, with_needles=True
    )

    num_documents = sum(bool(piece.answers) for piece in pieces)
    # As many of each style, of which there are three.
    assert abs(num_documents - len(pieces) / 4) <= 3
    assert sum(len(piece.token_ids) for piece in pieces if not piece.answers) > 47_000
