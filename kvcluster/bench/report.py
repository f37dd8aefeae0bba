"""What a benchmark hands back: numbers with their unit, their target, and where they were taken."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

_PACKAGES = ("kvcluster", "torch", "triton", "transformers", "ray", "grpcio")


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One number."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    """The target, where there is one."""

    @property
    def meets_target(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where the numbers were taken."""

    processor: str
    num_cpus: int
    python: str
    packages: dict[str, str]
    """Versions, by name, of those that are installed."""
    gpu: str = ""


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one benchmark."""

    name: str
    command: str
    date: str
    """UTC, ISO 8601."""
    machine: Machine
    measurements: tuple[Measurement, ...]

    @property
    def meets_targets(self) -> bool:
        return all(measurement.meets_target for measurement in self.measurements)


def bench_report(
    name: str, measurements: tuple[Measurement, ...], *, command: str = "", gpu: str = ""
) -> BenchReport:
    """The report of a run that ended now, on this machine."""
    return BenchReport(
        name=name,
        command=command or f"kvcluster bench {name}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(gpu),
        measurements=measurements,
    )


def machine(gpu: str = "") -> Machine:
    installed = {distribution.name for distribution in metadata.distributions()}
    return Machine(
        processor=_processor(),
        num_cpus=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        packages={name: metadata.version(name) for name in _PACKAGES if name in installed},
        gpu=gpu,
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
