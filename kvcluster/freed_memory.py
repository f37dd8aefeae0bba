"""What a process gives back to its allocator does not keep what it held."""

import ctypes
import sys
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
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_PERTURB, _PATTERN))
