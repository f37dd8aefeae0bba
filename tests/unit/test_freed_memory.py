"""What is freed inside `freed_memory_overwritten` does not keep what it held, and what is freed
after it does."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone can")

PROGRAM = """
import ctypes
from kvcluster.freed_memory import freed_memory_overwritten
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def left():
    # Nothing else may be allocated between: it would get the memory that was freed.
    found = ctypes.create_string_buffer(1024)
    at = libc.malloc(ctypes.c_size_t(4096))
    ctypes.memset(at, 0x42, 4096)
    freed, inside = ctypes.c_void_p(at), ctypes.c_void_p(at + 1024)
    libc.free(freed)
    ctypes.memmove(found, inside, 1024)
    return found.raw.count(b"\\x42")
before = left()
with freed_memory_overwritten():
    inside = left()
print(before, inside, left())
"""


def test_memory_is_overwritten_inside_the_block_alone(tmp_path: Path) -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library cannot")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=tmp_path
    )

    assert done.stdout.split() == ["1024", "0", "1024"]
