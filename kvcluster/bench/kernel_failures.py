"""What a suite of kernels does with one that fails: it says so and goes on."""

import sys
from collections.abc import Callable
from typing import Final

from triton.errors import TritonError

FAILURES: Final = (RuntimeError, TritonError)
"""Of a kernel that does not compile, finds no room, or breaks off: CUDA's errors, torch's own, and
Triton's."""


def report_failure(title: str, error: BaseException) -> None:
    """One line on stderr: what failed must not cost a run its other numbers."""
    words = " ".join(str(error).split())
    sys.stderr.write(f"{title}: {type(error).__name__}: {words[:300]}\n")


def runs(title: str, call: Callable[[], object]) -> bool:
    """Whether the call runs; reported where it does not."""
    try:
        call()
    except FAILURES as error:
        report_failure(title, error)
        return False
    return True
