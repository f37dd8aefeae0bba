import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.cli.main import app

MET = Measurement(name="decode", value=0.95, unit="ratio", at_least=0.9)
MISSED = Measurement(name="step", value=1.8, unit="ms", at_most=1.5)
PLAIN = Measurement(name="tokens", value=1_000_000, unit="tokens")


def bench(monkeypatch: pytest.MonkeyPatch, report: BenchReport, *arguments: str) -> Result:
    monkeypatch.setattr("kvcluster.cli.bench.benchmark", lambda name: lambda: report)
    return CliRunner().invoke(app, ["bench", report.name, *arguments])


def test_numbers_are_printed_beside_their_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench(monkeypatch, bench_report("e2e", (MET, PLAIN)))

    assert result.exit_code == 0
    assert "met: at least 0.900" in result.stdout
    assert "1,000,000.000 tokens" in result.stdout
    assert "kvcluster bench e2e" in result.stdout


def test_a_missed_target_exits_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench(monkeypatch, bench_report("step", (MET, MISSED)))

    assert result.exit_code == 3
    assert "MISSED: at most 1.500" in result.stdout


def test_json_is_one_object_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench(monkeypatch, bench_report("e2e", (MET,)), "--json")

    report = json.loads(result.stdout)
    assert (report["name"], report["measurements"][0]["value"]) == ("e2e", 0.95)


def test_the_report_is_also_written_to_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "e2e.json"

    bench(monkeypatch, bench_report("e2e", (MET,)), "--output", str(output))

    assert json.loads(output.read_text())["machine"]["packages"]["kvcluster"]


def test_a_folder_that_is_not_there_is_refused_before_the_benchmark_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "e2e", "--output", str(tmp_path / "no" / "x.json")])

    assert result.exit_code == 2
    assert "--output: no folder" in result.stderr


def test_an_unknown_benchmark_exits_with_2() -> None:
    assert CliRunner().invoke(app, ["bench", "e3e"]).exit_code == 2
