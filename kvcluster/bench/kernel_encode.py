"""Suite `encode` of `kvcluster bench kernels`: blocks of one array of a layer into a cache's pages,
beside the codec in PyTorch, which writes the same bytes."""

import sys
from collections.abc import Callable, Iterator
from typing import Final

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from kvcluster.bench.encode_calls import FORMATS, EncodeShape, encode_calls
from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.report import Measurement

SHAPES: Final = (EncodeShape(128, 8, 128), EncodeShape(1024, 8, 128), EncodeShape(1024, 8, 64))
"""Chunks of 8,192 and of 65,536 tokens."""


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:  # noqa: ARG001
    """Time, bytes read and written over it, and how much faster than PyTorch."""
    for shape in SHAPES:
        for name in FORMATS:
            if timer.is_over:
                return
            calls = encode_calls(name, shape, torch.device("cuda"))
            title = f"{shape} {name}"
            taken = _taken(timer, title, calls.kernel)
            if taken is None:
                continue
            yield Measurement(name=title, value=taken, unit="us")
            speed = calls.num_bytes / taken * 1e-6
            yield Measurement(name=f"{title} speed", value=speed, unit="TB/s")
            plain = _taken(timer, f"{title} in PyTorch", calls.codec)
            if plain is not None:
                yield Measurement(
                    name=f"{title} beside PyTorch", value=plain / taken, unit="x", at_least=1.0
                )


def _taken(timer: KernelTimer, title: str, call: Callable[[], None]) -> float | None:
    """Microseconds; None where time is over or the kernel cannot run here."""
    if timer.is_over:
        return None
    try:
        return timer.microseconds(call, repeats=7)
    except (RuntimeError, CompilationError, OutOfResources) as error:
        sys.stderr.write(f"{title}: {type(error).__name__}: {str(error)[:300]}\n")
        return None
