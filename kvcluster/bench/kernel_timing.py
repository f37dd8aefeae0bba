"""Times kernels on a GPU as a model's decode finds them: launched from a CUDA graph, nothing of
their input in L2."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

_REPEATS: Final = 15
_WARM_UP: Final = 2
_FLUSH_BYTES: Final = 512 << 20
"""Ten times the L2 of an H100; while they are read, launches are prepared. What a layer leaves in
L2 is what it read, weights above all; were they written, what is timed would write them back."""


class KernelTimer:
    """Medians in microseconds, on the current CUDA device, until its time is over."""

    def __init__(self, *, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._flushed = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._sum = torch.empty((), dtype=torch.int64, device="cuda")

    @property
    def is_over(self) -> bool:
        """Whether the time for all measurements is used up: suites then stop."""
        return time.monotonic() > self._deadline

    def microseconds(self, call: Callable[[], object], *, repeats: int = _REPEATS) -> float:
        """Median time of what `call` enqueues. It must do the same work each time, on the same
        memory, and never wait for the GPU."""
        replay = _captured(call)
        marks = [(_event(), _event()) for _ in range(repeats)]
        for start, end in marks:
            torch.sum(self._flushed, 0, out=self._sum)
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(float(start.elapsed_time(end)) for start, end in marks) * 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return graph.replay


def gpu_name() -> str:
    """The device, its driver and what limits its speed, for a report."""
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / 2**30
    return (
        f"{properties.name}, {memory_gib:.0f} GiB, {properties.multi_processor_count} SMs, "
        f"CUDA {torch.version.cuda}, {os.cpu_count()} CPUs"
    )
