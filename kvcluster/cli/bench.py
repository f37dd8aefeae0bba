"""`kvcluster bench`: runs one benchmark and prints its numbers beside their targets."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvcluster.bench.registry import BENCHMARKS, benchmark
from kvcluster.bench.report import BenchReport, Measurement
from kvcluster.cli.exits import ExitCode, exiting, print_json
from kvcluster.errors import ConfigError

_NAMES = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())


def bench(
    *,
    name: Annotated[str, typer.Argument(help=f"{_NAMES}.")],
    output: Annotated[Path | None, typer.Option(help="Also write the report there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Measure this machine. Exits with 3 when a target is missed."""
    with exiting(as_json=as_json):
        if output is not None and not output.parent.is_dir():
            raise ConfigError(f"--output: no folder {output.parent}")
        # Ray prints what its processes say to stdout, which is the report's alone.
        with redirect_stdout(sys.stderr):
            report = benchmark(name)()
        if output is not None:
            encoded = msgspec.json.format(msgspec.json.encode(report), indent=2)
            output.write_bytes(encoded + b"\n")
        if as_json:
            print_json(report)
        else:
            _print(report)
        if not report.meets_targets:
            raise typer.Exit(ExitCode.UNAVAILABLE)


def _print(report: BenchReport) -> None:
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    typer.echo(f"{report.command}, {report.date}, {machine.num_cpus} x {machine.processor}")
    typer.echo(versions)
    for measurement in report.measurements:
        typer.echo(
            f"{measurement.name:<44} {measurement.value:>14,.3f} {measurement.unit:<10} "
            f"{_target(measurement)}"
        )


def _target(measurement: Measurement) -> str:
    if measurement.at_least is None and measurement.at_most is None:
        return ""
    verdict = "met" if measurement.meets_target else "MISSED"
    if measurement.at_least is not None:
        return f"{verdict}: at least {measurement.at_least:,.3f}"
    return f"{verdict}: at most {measurement.at_most:,.3f}"
