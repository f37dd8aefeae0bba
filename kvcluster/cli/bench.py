"""`kvcluster bench`: runs one benchmark and prints its numbers beside their targets."""

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvcluster.bench.registry import BENCHMARKS, benchmark
from kvcluster.bench.report import BenchReport, Measurement
from kvcluster.cli.exits import ExitCode, exiting, print_json
from kvcluster.config import CacheConfig
from kvcluster.errors import ConfigError

_QUALITY = "quality"
_KERNELS = "kernels"
_NAMES = "; ".join(
    f"{name}: {what}"
    for name, what in (
        *BENCHMARKS.items(),
        (_QUALITY, "what policies of compression cost a model, beside the exact cache"),
    )
)


def bench(
    *,
    name: Annotated[str, typer.Argument(help=f"{_NAMES}.")],
    output: Annotated[Path | None, typer.Option(help="Also write the report there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
    model: Annotated[str | None, typer.Option(help="For quality: what to measure.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="For quality; repeatable.")] = None,
    tokens: Annotated[int | None, typer.Option(help="For quality: of each text.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="For quality: a text to read; repeatable."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="For quality: what `kvcluster calibrate` wrote.")
    ] = None,
    exact_recent: Annotated[
        int | None, typer.Option(help="For quality: latest tokens that are read exact.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="For quality: measure through a cluster of so many ranks.")
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="For kernels: all without it; repeatable.")
    ] = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="For kernels: settings that were not chosen too.")
    ] = False,
) -> None:
    """Measure this machine. Exits with 3 when a target is missed."""
    with exiting(as_json=as_json):
        if output is not None and not output.parent.is_dir():
            raise ConfigError(f"--output: no folder {output.parent}")
        if name == _QUALITY:
            if model is None or not policy:
                raise ConfigError("bench quality: want --model and --policy")
            _quality(
                as_json=as_json,
                model=model,
                policies=tuple(policy),
                num_tokens=tokens,
                text_names=tuple(text or ()),
                calibration=calibration,
                output=output,
                exact_recent_tokens=(
                    CacheConfig().exact_recent_tokens if exact_recent is None else exact_recent
                ),
                num_ranks=ranks or 0,
            )
            return
        if (model, policy, tokens, text, calibration, exact_recent, ranks) != (None,) * 7:
            raise ConfigError(
                "bench: --model, --policy, --tokens, --text, --calibration, --exact-recent and "
                "--ranks are for quality"
            )
        if name != _KERNELS and (suite or variants):
            raise ConfigError("bench: --suite and --variants are for kernels")
        # Ray prints what its processes say to stdout, which is the report's alone.
        with redirect_stdout(sys.stderr):
            report = (
                _kernels(suite, with_variants=variants) if name == _KERNELS else benchmark(name)()
            )
        if output is not None:
            encoded = msgspec.json.format(msgspec.json.encode(report), indent=2)
            output.write_bytes(encoded + b"\n")
        if as_json:
            print_json(report)
        else:
            _print(report)
        if not report.meets_targets:
            raise typer.Exit(ExitCode.UNAVAILABLE)


def _kernels(suites: list[str] | None, *, with_variants: bool) -> BenchReport:
    from kvcluster.bench.kernels import SUITES, run

    return run(tuple(suites or SUITES), with_variants=with_variants)


def _quality(
    *,
    as_json: bool,
    model: str,
    policies: tuple[str, ...],
    num_tokens: int | None,
    text_names: tuple[str, ...],
    calibration: Path | None,
    output: Path | None,
    exact_recent_tokens: int,
    num_ranks: int,
) -> None:
    """Each policy's line goes to stderr as it comes; a run that was cut off goes on in `output`."""
    # torch takes seconds, and this module is imported by every command.
    from kvcluster.bench.quality import measure_quality
    from kvcluster.bench.quality_settings import QualitySettings

    settings = QualitySettings(
        model=model,
        policies=policies,
        num_tokens=num_tokens,
        text_names=text_names,
        calibration=calibration,
        output=output,
        exact_recent_tokens=exact_recent_tokens,
        num_ranks=num_ranks,
    )
    report = measure_quality(settings, partial(typer.echo, err=True))
    if as_json:
        print_json(report)


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
