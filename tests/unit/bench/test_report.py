import ast
import os
from pathlib import Path

import pytest

from kvcluster import bench as bench_package
from kvcluster.bench.registry import BENCHMARKS, benchmark
from kvcluster.bench.report import Measurement, bench_report
from kvcluster.errors import ConfigError


@pytest.mark.parametrize(
    ("bounds", "is_met"),
    [
        ({}, True),
        ({"at_least": 2.0}, True),
        ({"at_least": 2.1}, False),
        ({"at_most": 2.0}, True),
        ({"at_most": 1.9}, False),
    ],
)
def test_a_measurement_meets_its_target_at_the_bound(
    bounds: dict[str, float], is_met: bool
) -> None:
    measurement = Measurement(name="speed", value=2.0, unit="x", **bounds)

    assert measurement.meets_target is is_met


def test_a_report_meets_its_targets_when_every_measurement_does() -> None:
    good = Measurement(name="a", value=1.0, unit="x", at_least=1.0)
    bad = Measurement(name="b", value=1.0, unit="x", at_most=0.5)

    assert bench_report("e2e", (good,)).meets_targets
    assert not bench_report("e2e", (good, bad)).meets_targets


def test_a_report_says_where_and_how_its_numbers_were_taken() -> None:
    report = bench_report("e2e", ())

    assert report.command == "kvcluster bench e2e"
    assert report.date.endswith("+00:00")
    assert report.machine.processor
    assert report.machine.num_cpus == len(os.sched_getaffinity(0))
    assert "torch" in report.machine.packages


def test_an_unknown_benchmark_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="no benchmark 'e3e'; there are e2e, context, upload, memory, step"
    ):
        benchmark("e3e")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_a_module_with_run(name: str) -> None:
    source = Path(bench_package.__path__[0]) / f"{name}.py"
    tree = ast.parse(source.read_text())

    assert "run" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
