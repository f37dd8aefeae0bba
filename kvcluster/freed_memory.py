"""What a process gives back to its allocator does not keep what it held."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_M_PERTURB: Final = -6
_PATTERN: Final = 0xA5


def overwrite_freed_memory() -> bool:
    """From now on the C library overwrites whatever this process frees: prompts, messages, keys.

    For processes that carry what callers send, which is little beside the work on it. Those that
    hold tensors do without: every temporary tensor would be written once more. Returns whether the
    C library can (glibc's M_PERTURB, mallopt(3)); pieces of at most 512 bytes that Python keeps to
    itself are not overwritten.
    """
    return _set_pattern(_PATTERN)


@contextmanager
def freed_memory_overwritten() -> Iterator[None]:
    """The same inside the `with` block alone, for a process that holds tensors: of what it does not
    want to leave behind. One at a time, and not where it is on for good."""
    _set_pattern(_PATTERN)
    try:
        yield
    finally:
        _set_pattern(0)


def _set_pattern(pattern: int) -> bool:
    """0: none."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_PERTURB, pattern))
