"""`kvcluster calibrate` writes a file that is served, and says in one line what it cannot read."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvcluster.cli.main import app
from kvcluster.codec.calibration import read_calibration
from kvcluster.model.loader import load_model
from tests.model_directory import write_tiny_model

PROSE = "Some words, one after another, and then some more of them. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory)
    return directory


def calibrate(model: Path, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app,
        [
            "calibrate", "--model", str(model), "--out", str(out), "--tokens", "512",
            "--documents", "0", "--block-size", "16", "--exact-recent", "32",
            "--policy", "int4", "--policy", "latent:r=0.5,bits=8", *arguments,
        ],
    )  # fmt: skip


def test_own_texts_give_a_file_and_a_table(model: Path, tmp_path: Path) -> None:
    data = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in data:
        path.write_text(f"{path.name} {PROSE * 10}")
    out = tmp_path / "tiny.safetensors"

    result = calibrate(model, out, "--data", str(data[0]), "--data", str(data[1]))

    assert result.exit_code == 0, result.stderr
    assert "fitted to 1,024 tokens; recipes measured on interfaces, tensor-manual" in result.stdout
    assert {line.split()[-1] for line in result.stdout.splitlines()[2:-1]} - {"(dominated)"} <= {
        "int4",
        "latent:r=0.5,bits=8",
    }
    spec = load_model(str(model), dtype="float32", device="cpu").spec
    assert "int4" in read_calibration(out, spec.weights_digest).recipes_json


def test_bases_of_several_layers_are_fitted_where_they_are_asked_for(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny.safetensors"

    result = calibrate(model, out, "--layers", "2")

    assert result.exit_code == 0, result.stderr
    spec = load_model(str(model), dtype="float32", device="cpu").spec
    groups = read_calibration(out, spec.weights_digest).groups
    assert groups
    assert all(len(group.layers) == 2 for group in groups)


def test_bases_are_refined_for_the_policies_that_ask_for_it(model: Path, tmp_path: Path) -> None:
    out, codec = tmp_path / "tiny.safetensors", "latent:r=0.5,bits=4,layers=2"

    result = calibrate(model, out, "--refine", codec, "--refine-steps", "2", "--fisher", "2")

    assert result.exit_code == 0, result.stderr
    assert f"refined {codec}: divergence " in result.stdout
    spec = load_model(str(model), dtype="float32", device="cpu").spec
    calibration = read_calibration(out, spec.weights_digest)
    assert codec in calibration.recipes_json
    is_kept = "so the fitted bases stay" not in result.stdout
    assert {each.codec for each in calibration.refined} == ({codec} if is_kept else set())


def test_a_policy_without_latents_is_not_refined(model: Path, tmp_path: Path) -> None:
    result = calibrate(model, tmp_path / "tiny.safetensors", "--refine", "int4")

    assert result.exit_code == 2
    assert "policy int4 has no bases to refine: want latents of keys or values" in result.stderr


def test_json_is_one_object_with_the_recipes(model: Path, tmp_path: Path) -> None:
    result = calibrate(model, tmp_path / "tiny.safetensors", "--json")

    report = json.loads(result.stdout)
    # Two texts, each read four times 512 tokens on.
    assert report["num_calibration_tokens"] == 2 * 4 * 512
    assert [recipe["policy"] for recipe in report["recipes"]] == ["int4", "latent:r=0.5,bits=8"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"text \xff", "want UTF-8, byte 5 is not"),
        (b"text", "needs at least 128 tokens of text, got 0"),
    ],
)
def test_data_that_is_no_text_is_refused(
    model: Path, tmp_path: Path, content: bytes, reason: str
) -> None:
    data = tmp_path / "data.txt"
    data.write_bytes(content)

    result = calibrate(model, tmp_path / "tiny.safetensors", "--data", str(data))

    assert result.exit_code == 2
    assert reason in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_data_that_is_no_file_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    result = calibrate(model, tmp_path / "tiny.safetensors", "--data", str(tmp_path / name))

    assert result.exit_code == 2
    assert "cannot be read: " in result.stderr


def test_an_out_folder_that_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    result = calibrate(model, tmp_path / "missing" / "tiny.safetensors")

    assert result.exit_code == 2
    assert f"--out: no folder {tmp_path / 'missing'}" in result.stderr


def test_a_folder_as_out_is_refused(model: Path, tmp_path: Path) -> None:
    result = calibrate(model, tmp_path)

    assert result.exit_code == 2
    assert "is a folder" in result.stderr


def test_an_unknown_policy_is_refused(model: Path, tmp_path: Path) -> None:
    result = calibrate(model, tmp_path / "tiny.safetensors", "--policy", "int5")

    assert result.exit_code == 2
    assert "no method is called 'int5'" in result.stderr


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = calibrate(tmp_path / "none", tmp_path / "tiny.safetensors")

    assert result.exit_code == 2
