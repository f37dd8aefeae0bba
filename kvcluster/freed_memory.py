"""What a process gives back to its allocator does not keep what it held."""

import ctypes
import sys
from typing import Final

_M_PERTURB: Final = -6
_PATTERN: Final = 0xA5


def overwrite_freed_memory() -> bool:
    """From now on the C library overwrites whatever this process frees: prompts, messages, keys,
    and tensors in the host's memory, copies of blocks among them.

    Returns whether it can (glibc's M_PERTURB, mallopt(3)). Not overwritten are pieces of at most
    512 bytes that Python keeps to itself, and of those of at most 1,032 bytes the seven of each
    size that a thread freed last (glibc 2.36): they stay until they are used again.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_PERTURB, _PATTERN))
