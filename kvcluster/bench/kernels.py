"""`kvcluster bench kernels`: our attention kernels beside the best there are, on one GPU.

Also `python -m kvcluster.bench.kernels --suite decode --output FILE`, for a GPU machine without
Ray and gRPC. A suite is a module with a function

    measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]

which yields numbers as it has them, stops when the timer's time is over, and is a line in `SUITES`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

import msgspec

from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.errors import ConfigError

SUITES: Final = {
    "decode": "kvcluster.bench.kernel_decode",
    "latent": "kvcluster.bench.kernel_latent",
    "encode": "kvcluster.bench.kernel_encode",
    "chosen": "kvcluster.bench.kernel_chosen",
    "selected": "kvcluster.bench.kernel_selected",
    "prefill": "kvcluster.bench.kernel_prefill",
    "history": "kvcluster.bench.kernel_history",
}
"""Name and module, in the order in which they run."""

_SECONDS: Final = 150.0


def run(
    suites: Sequence[str] = tuple(SUITES),
    *,
    with_variants: bool = False,
    seconds: float = _SECONDS,
    output: Path | None = None,
) -> BenchReport:
    """Run some suites in one process. `with_variants`: also the settings that were not chosen.
    `seconds`: of each suite. `output` is rewritten after each number, so that a run that is cut
    off leaves what it had.

    Raises: ConfigError where there is no such suite, or no GPU.
    """
    for suite in suites:
        if suite not in SUITES:
            raise ConfigError(f"bench kernels: no suite {suite!r}; there are {', '.join(SUITES)}")
    # torch takes seconds, and the command line imports this module to show its help.
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("bench kernels: there is no CUDA device here")
    from kvcluster.bench.kernel_timing import KernelTimer, gpu_name

    gpu, command = gpu_name(), _command(suites, with_variants=with_variants)
    taken: list[Measurement] = []

    def report() -> BenchReport:
        return bench_report("kernels", tuple(taken), command=command, gpu=gpu)

    for suite in suites:
        module = import_module(SUITES[suite])
        for measurement in module.measure(
            KernelTimer(seconds=seconds), with_variants=with_variants
        ):
            taken.append(measurement)
            sys.stderr.write(f"{measurement.name} {measurement.value:,.2f} {measurement.unit}\n")
            if output is not None:
                output.write_bytes(encoded(report()))
    return report()


def _command(suites: Sequence[str], *, with_variants: bool) -> str:
    flags = [f"--suite {suite}" for suite in suites] + ["--variants"] * with_variants
    return " ".join(["kvcluster bench kernels", *flags])


def encoded(report: BenchReport) -> bytes:
    """The report as JSON to be read by people too."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run suites without the command line of kvcluster, which wants more packages."""
    parser = argparse.ArgumentParser(prog="python -m kvcluster.bench.kernels")
    parser.add_argument("--suite", action="append", choices=tuple(SUITES), help="repeatable")
    parser.add_argument("--variants", action="store_true", help="settings not chosen as well")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of each suite")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args(arguments)
    report = run(
        options.suite or tuple(SUITES),
        with_variants=options.variants,
        seconds=options.seconds,
        output=options.output,
    )
    sys.stdout.buffer.write(encoded(report))


if __name__ == "__main__":
    main()
