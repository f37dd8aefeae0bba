"""The command measures a model from a directory, goes on with its report, and refuses plainly."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from kvcluster.bench.quality import main, measure_quality
from kvcluster.bench.quality_settings import QualitySettings, summary
from kvcluster.cli.main import app
from kvcluster.errors import CalibrationMismatch, ConfigError, InvalidField
from kvcluster.quality.sweep_records import read_report
from kvcluster.quality.texts import Purpose, Text
from tests.model_directory import write_tiny_model

PROSE = "Some words, one after another, and then some. "
TEXTS = (
    Text(name="learned", purpose=Purpose.CALIBRATION, content=PROSE * 40),
    Text(name="judged", purpose=Purpose.EVALUATION, content=PROSE[::-1] * 40),
    Text(name="other", purpose=Purpose.EVALUATION, content=PROSE.upper() * 40),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory)
    return directory


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> QualitySettings:
    texts = tmp_path / "texts.json"
    texts.write_bytes(msgspec.json.encode(TEXTS))
    return QualitySettings(
        model=str(model),
        policies=("int4",),
        num_tokens=200,
        texts_file=texts,
        lengths=(500,),
        num_seeds=1,
        num_needles=1,
        output=tmp_path / "report.json",
        first_scored=100,
        block_size=16,
        exact_recent_tokens=32,
    )


def ignore(_line: str) -> None: ...


def test_every_policy_is_measured_on_evaluation_texts_and_documents(
    settings: QualitySettings,
) -> None:
    lines: list[str] = []

    report = measure_quality(settings, lines.append)

    [score] = report.scores
    assert [text.name for text in report.subject.texts] == ["judged", "other"]
    assert [text.num_tokens for text in score.texts] == [200, 200]
    assert {document.num_tokens for document in score.recall} == {500}
    assert lines[-1] == f"[1/1] {summary(score)}"
    assert settings.output is not None
    assert read_report(settings.output) == report


def test_processes_find_what_one_finds(settings: QualitySettings, tmp_path: Path) -> None:
    policies = ("int4", "int8 + window:recent=64")
    alone = measure_quality(replace(settings, policies=policies), ignore)

    together = measure_quality(
        replace(settings, policies=policies, num_processes=2, output=tmp_path / "other.json"),
        ignore,
    )

    assert together.subject == alone.subject
    for found, wanted in zip(together.scores, alone.scores, strict=True):
        assert msgspec.structs.replace(found, seconds=0) == msgspec.structs.replace(
            wanted, seconds=0
        )
    assert read_report(tmp_path / "other.json") == together


def test_a_wrong_setting_is_told_by_the_processes_too(settings: QualitySettings) -> None:
    with pytest.raises(ConfigError, match="no evaluation text 'missing'"):
        measure_quality(replace(settings, text_names=("missing",), num_processes=2), ignore)


def test_a_second_run_measures_what_is_missing(settings: QualitySettings) -> None:
    first = measure_quality(settings, ignore)

    second = measure_quality(replace(settings, policies=("int8", "int4")), ignore)

    assert second.scores[0] == first.scores[0]
    assert [score.policy for score in second.scores] == ["int4", "int8"]


def test_reports_name_canonical_policies_each_once(settings: QualitySettings) -> None:
    names = (" int4 : key_group=64", "int4", "window:recent=64+int8")

    report = measure_quality(replace(settings, policies=names, num_seeds=0), ignore)

    assert [score.policy for score in report.scores] == ["int4", "int8 + window:recent=64"]


def test_a_report_of_other_exact_tokens_is_not_gone_on_with(settings: QualitySettings) -> None:
    measure_quality(settings, ignore)

    with pytest.raises(ConfigError, match="exact tokens"):
        measure_quality(replace(settings, exact_recent_tokens=64), ignore)


def test_bases_of_another_model_are_refused(settings: QualitySettings, tmp_path: Path) -> None:
    bases = tmp_path / "bases.safetensors"
    bases.write_bytes(b"no bases")

    with pytest.raises(CalibrationMismatch, match="no calibration file"):
        measure_quality(replace(settings, policies=("latent",), calibration=bases), ignore)


def test_texts_can_be_chosen_by_name(settings: QualitySettings) -> None:
    report = measure_quality(replace(settings, text_names=("other",), num_seeds=0), ignore)

    assert [text.name for text in report.subject.texts] == ["other"]
    assert report.scores[0].recall == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_names": ("learned",)}, "no evaluation text 'learned'"),
        ({"texts_file": Path("/nowhere")}, "/nowhere cannot be read"),
        ({"policies": ("latent",)}, "policy latent: .* need a calibration file"),
        ({"policies": ("window:recent=40",)}, "give 16 or a multiple"),
        ({"exact_recent_tokens": -1}, "got 16 and -1"),
        ({"num_tokens": 5000}, "tokens, not 5000"),
        ({"lengths": (50,)}, "need"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    settings: QualitySettings, change: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        measure_quality(msgspec.convert({**_fields(settings), **change}, QualitySettings), ignore)


def test_a_policy_that_is_none_is_refused_before_the_model_is_loaded(
    settings: QualitySettings,
) -> None:
    with pytest.raises(InvalidField, match="no method is called 'int5'"):
        measure_quality(replace(settings, model="/nowhere", policies=("int5",)), ignore)


def _fields(settings: QualitySettings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in QualitySettings.__dataclass_fields__}


def test_the_command_prints_the_report_and_reads_policies_from_a_file(
    settings: QualitySettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = tmp_path / "policies.txt"
    policies.write_text("# two\nint8\n\nint2\n")

    main([
        "--model", settings.model, "--texts", str(settings.texts_file), "--tokens", "200",
        "--first-scored", "100", "--block-size", "32", "--seeds", "0", "--json",
        "--exact-recent", "32",
        "--policies", str(policies), "--policy", "int4",
    ])  # fmt: skip

    report = json.loads(capsys.readouterr().out)
    assert [score["policy"] for score in report["scores"]] == ["int4", "int8", "int2"]


@pytest.mark.parametrize("arguments", [[], ["--model", "m"], ["--policies", "/nowhere"]])
def test_a_command_without_model_or_policy_ends_with_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_kvcluster_bench_quality_wants_a_model_and_a_policy() -> None:
    result = CliRunner().invoke(app, ["bench", "quality", "--model", "smollm2-135m"])

    assert result.exit_code == 2
    assert "want --model and --policy" in result.stderr


def test_settings_of_quality_are_refused_for_other_benchmarks() -> None:
    result = CliRunner().invoke(app, ["bench", "step", "--policy", "int4"])

    assert result.exit_code == 2
    assert "--ranks are for quality" in result.stderr


def test_a_short_run_has_documents_of_its_one_length(settings: QualitySettings) -> None:
    short = replace(settings, lengths=(), num_tokens=500, policies=("int8",))

    [score] = measure_quality(short, ignore).scores

    assert {document.num_tokens for document in score.recall} == {500}
