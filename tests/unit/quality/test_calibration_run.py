"""A calibration fits, measures on other texts, and writes a file that says what it measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from kvcluster.codec.calibration import Calibration, read_calibration
from kvcluster.errors import CalibrationMismatch, ConfigError, InvalidField
from kvcluster.model.codecs import measured_table
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibration_run import (
    CalibrationReport,
    CalibrationSettings,
    Progress,
    calibrate,
)
from kvcluster.quality.held_out import CHOICE_TEXTS
from kvcluster.quality.recipe_table import DEFAULT_RECIPES
from kvcluster.quality.texts import Purpose, Text
from tests.unit.quality.toys import character_tokenizer, tiny_model

PROSE = "Some words, one after another, and then some more of them. "
TEXTS = (
    Text(name="learned", purpose=Purpose.CALIBRATION, content=PROSE * 40),
    *(
        Text(name=name, purpose=Purpose.EVALUATION, content=f"{name}: {PROSE[::-1]}" * 40)
        for name in (*CHOICE_TEXTS, "reported")
    ),
)


class Interrupted(Exception):
    """The run ends here."""


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture
def settings(tmp_path: Path) -> CalibrationSettings:
    return CalibrationSettings(
        out=tmp_path / "tiny.safetensors",
        policies=("int4", "latent:r=0.5,bits=8", "int8 + window:recent=64"),
        num_tokens=512,
        num_documents=0,
        block_size=16,
        exact_recent_tokens=32,
    )


def ignore(_stage: str, _done: int, _total: int) -> None: ...


def calibrated(
    model: LoadedModel, settings: CalibrationSettings, *contents: str
) -> CalibrationReport:
    return calibrate(model, character_tokenizer(), TEXTS, settings, ignore, contents=contents)


def assert_same_bases(one: Calibration, other: Calibration) -> None:
    assert one.text_digests == other.text_digests
    for layer, expected in zip(one.layers, other.layers, strict=True):
        assert torch.equal(layer.keys.down_FC, expected.keys.down_FC)
        assert torch.equal(layer.values.down_FC, expected.values.down_FC)


def test_the_file_holds_bases_and_the_recipes_that_were_measured_with_them(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    report = calibrated(model, settings)

    calibration = read_calibration(settings.out, model.spec.weights_digest)
    table = measured_table(calibration)
    assert table.recipes == report.recipes
    assert table.block_size == settings.block_size
    assert table.exact_recent_tokens == settings.exact_recent_tokens
    assert [recipe.policy for recipe in report.recipes] == [*settings.policies]
    assert all(recipe.ratio > 1 and recipe.perplexity_error > 0 for recipe in report.recipes)
    assert report.num_calibration_tokens == calibration.num_tokens == 4 * 512
    assert report.measured_on == CHOICE_TEXTS
    assert [path.name for path in settings.out.parent.iterdir()] == [settings.out.name]


def test_a_policy_of_several_layers_has_their_bases_fitted(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    policy = "latent:r=0.5,bits=8,layers=2"
    report = calibrated(model, replace(settings, policies=(policy,), joined=(3,)))

    calibration = read_calibration(settings.out, model.spec.weights_digest)
    num_layers = len(model.spec.layers)
    pairs = [range(first, first + 2) for first in range(0, num_layers - 1, 2)]
    triples = [range(first, min(first + 3, num_layers)) for first in range(0, num_layers - 1, 3)]
    assert {group.layers for group in calibration.groups} == {*pairs, *triples}
    assert [recipe.policy for recipe in report.recipes] == [policy]
    assert report.recipes[0].ratio > 1


@pytest.mark.parametrize("joined", [0, 9])
def test_a_number_of_layers_that_is_not_offered_is_refused(
    model: LoadedModel, settings: CalibrationSettings, joined: int
) -> None:
    with pytest.raises(ConfigError, match="want 1 to 8 layers together"):
        calibrated(model, replace(settings, joined=(joined,)))


def test_default_recipes_are_those_that_the_model_can_have(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    report = calibrated(model, replace(settings, policies=()))

    # Nobody asked for bases of several layers.
    possible = [recipe for recipe in DEFAULT_RECIPES if "layers=" not in recipe]
    assert [recipe.policy for recipe in report.recipes] == possible


def test_own_texts_replace_those_that_bases_are_fitted_to(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    report = calibrated(model, settings, PROSE * 10, PROSE.upper() * 20)

    # Of 591 and 1181 tokens, without the ends of under 256.
    assert report.num_calibration_tokens == 3 * 512
    assert report.measured_on == CHOICE_TEXTS


def interrupt_after(num_passes: int, stage: str = "texts") -> Progress:
    def progress(current: str, done: int, _total: int) -> None:
        if current == stage and done == num_passes:
            raise Interrupted

    return progress


@contextmanager
def counted_passes(model: LoadedModel) -> Iterator[list[int]]:
    """Lengths of the passes that the model runs."""
    lengths: list[int] = []
    layer = model.module.base_model.layers[0]
    handle = layer.register_forward_hook(
        lambda _layer, _inputs, output: lengths.append(output.shape[1])
    )
    try:
        yield lengths
    finally:
        handle.remove()


def test_a_run_that_was_broken_off_goes_on_where_it_was(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    whole = replace(settings, out=settings.out.with_name("whole.safetensors"))
    with counted_passes(model) as passes_of_whole:
        calibrated(model, whole)
    with pytest.raises(Interrupted):
        calibrate(model, character_tokenizer(), TEXTS, settings, interrupt_after(3))
    assert not settings.out.exists()

    with counted_passes(model) as passes_of_rest:
        calibrated(model, settings)

    assert passes_of_whole.count(512) - passes_of_rest.count(512) == 3
    assert_same_bases(
        read_calibration(settings.out, model.spec.weights_digest),
        read_calibration(whole.out, model.spec.weights_digest),
    )
    assert sorted(path.name for path in settings.out.parent.iterdir()) == [
        "tiny.safetensors",
        "whole.safetensors",
    ]


def test_recipes_that_were_measured_are_not_measured_again(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    whole = replace(settings, out=settings.out.with_name("whole.safetensors"))
    expected = calibrated(model, whole)
    with pytest.raises(Interrupted):
        # Two texts: exact, the first two recipes, and one text of the third.
        calibrate(model, character_tokenizer(), TEXTS, settings, interrupt_after(7, "recipes"))
    heard: list[tuple[str, int, int]] = []

    with counted_passes(model) as passes:
        report = calibrate(
            model, character_tokenizer(), TEXTS, settings, lambda *stage: heard.append(stage)
        )

    # With the exact cache, and with the third recipe, which has to begin again.
    assert passes.count(512) == 2 + 2
    assert [done for stage, done, _ in heard if stage == "recipes"] == [0, *range(4, 9), 8]
    assert report == expected
    assert sorted(path.name for path in settings.out.parent.iterdir()) == [
        "tiny.safetensors",
        "whole.safetensors",
    ]


def test_nothing_is_run_again_where_only_the_file_was_missing(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    heard: list[tuple[str, int, int]] = []

    def interrupt_at_the_end(stage: str, done: int, total: int) -> None:
        if ("recipes", 8, 8) in heard:
            raise Interrupted
        heard.append((stage, done, total))

    with pytest.raises(Interrupted):
        calibrate(model, character_tokenizer(), TEXTS, settings, interrupt_at_the_end)

    with counted_passes(model) as passes:
        report = calibrated(model, settings)

    assert passes.count(512) == 0
    assert [recipe.policy for recipe in report.recipes] == [*settings.policies]


def test_recipes_of_other_texts_or_unreadable_ones_are_measured_again(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    expected = calibrated(model, settings)
    with pytest.raises(Interrupted):
        calibrate(model, character_tokenizer(), TEXTS, settings, interrupt_after(7, "recipes"))
    changed = [replace(text, content=text.content.replace("s", "S")) for text in TEXTS[1:]]
    other = calibrate(model, character_tokenizer(), [TEXTS[0], *changed], settings, ignore)
    kept = settings.out.with_name(f"{settings.out.name}.recipes.json")
    assert not kept.exists()

    kept.write_bytes(b"{")

    assert other.recipes != expected.recipes
    assert calibrated(model, settings) == expected


def test_only_recipes_that_are_asked_for_are_reported(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    with pytest.raises(Interrupted):
        calibrate(model, character_tokenizer(), TEXTS, settings, interrupt_after(7, "recipes"))

    report = calibrated(model, replace(settings, policies=("int8", "latent:r=0.5,bits=8")))

    assert [recipe.policy for recipe in report.recipes] == ["int8", "latent:r=0.5,bits=8"]


def test_what_a_run_of_other_texts_left_is_refused(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    with pytest.raises(Interrupted):
        calibrate(model, character_tokenizer(), TEXTS, settings, interrupt_after(1))

    with pytest.raises(CalibrationMismatch, match="other texts"):
        calibrated(model, settings, PROSE.upper() * 30)


def test_progress_tells_how_much_there_is_and_both_stages_to_their_ends(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    heard: list[tuple[str, int, int]] = []

    calibrate(model, character_tokenizer(), TEXTS, settings, lambda *stage: heard.append(stage))

    # Two texts, with the exact cache and with three recipes.
    assert heard == [
        ("recipes", 0, 8),
        *(("texts", done, 4) for done in range(5)),
        *(("recipes", done, 8) for done in range(9)),
        ("recipes", 8, 8),
    ]


def test_too_little_text_is_refused_with_what_is_needed_and_what_was_given(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    with pytest.raises(ConfigError, match="needs at least 128 tokens of text, got 0"):
        calibrated(model, settings, "A line.")


@pytest.mark.parametrize("num_tokens", [511, 513])
def test_passes_that_are_too_short_or_too_long_are_refused(
    model: LoadedModel, settings: CalibrationSettings, num_tokens: int
) -> None:
    with pytest.raises(ConfigError, match=f"passes of 512 to 512 tokens .* got {num_tokens}"):
        calibrated(model, replace(settings, num_tokens=num_tokens))


@pytest.mark.parametrize(
    ("policies", "error"), [(("int5",), InvalidField), (("window:recent=40",), ConfigError)]
)
def test_policies_that_cannot_be_measured_leave_no_file(
    model: LoadedModel,
    settings: CalibrationSettings,
    policies: tuple[str, ...],
    error: type[Exception],
) -> None:
    with pytest.raises(error):
        calibrated(model, replace(settings, policies=policies))

    assert not settings.out.exists()


@pytest.mark.parametrize("policy", ["window:recent=40", "latent:r=0.5,bits=8 + window:recent=40"])
@pytest.mark.parametrize("place", ["policies", "refine"])
def test_what_no_calibration_makes_good_is_refused_before_anything_is_computed(
    model: LoadedModel, settings: CalibrationSettings, policy: str, place: str
) -> None:
    heard: list[str] = []

    with pytest.raises(ConfigError, match="window"):
        calibrate(
            model,
            character_tokenizer(),
            TEXTS,
            replace(settings, **{place: (policy,)}),
            lambda stage, _done, _total: heard.append(stage),
        )

    assert not heard


def test_documents_that_do_not_fit_into_a_pass_are_refused(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    with pytest.raises(ConfigError, match="passages and questions need"):
        calibrated(model, replace(settings, num_documents=1))


def test_without_a_text_to_measure_on_nothing_begins(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    with pytest.raises(ConfigError, match="no text to measure"):
        calibrate(model, character_tokenizer(), TEXTS[:1], settings, ignore)


def test_documents_with_needles_are_fitted_to_and_measured_on(
    model: LoadedModel, settings: CalibrationSettings
) -> None:
    longer = LoadedModel(
        spec=msgspec.structs.replace(model.spec, max_context_tokens=4096),
        module=model.module,
        device=model.device,
    )
    texts = [replace(text, content=f"{PROSE}\n\n" * 80) for text in TEXTS]
    wanted = replace(settings, policies=("int8",), num_tokens=4000, num_documents=1)
    heard: list[str] = []

    report = calibrate(
        longer,
        character_tokenizer(),
        texts,
        wanted,
        lambda stage, _done, _total: heard.append(stage),
    )

    # Before the first, and after two passes over the text and a document of each of three styles.
    assert heard.count("texts") == 1 + 2 + 3
    assert report.num_calibration_tokens > 4 * 4000
    assert [recipe.policy for recipe in report.recipes] == ["int8"]
