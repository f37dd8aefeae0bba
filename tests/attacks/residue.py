"""What a process, folder or shared memory still holds of bytes that should be gone (Linux)."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_CHUNK_BYTES = 8 << 20
# A line of /proc/PID/maps: `7f2c4a000000-7f2c5a000000 rw-p 00000000 00:00 0  [heap]`. Memory that
# nobody can write, which is that of programs, holds nothing of a prompt.
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw", re.MULTILINE)


def found_in_process(pid: int, canaries: Mapping[str, bytes]) -> dict[str, int]:
    """How often each canary is in what a process has written, shared memory included."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    counts = dict.fromkeys(canaries, 0)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for first, last in _MAPPING.findall(maps):
            start, end = int(first, 16), int(last, 16)
            _count(counts, canaries, _pieces(memory.fileno(), start, end, _overlap(canaries)))
    return counts


def found_in_files(folders: Iterable[Path], canaries: Mapping[str, bytes]) -> dict[str, int]:
    """The same of every regular file below some folders."""
    counts = dict.fromkeys(canaries, 0)
    for file in (file for folder in folders for file in folder.rglob("*")):
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as content:
                size = file.stat().st_size
                _count(counts, canaries, _pieces(content.fileno(), 0, size, _overlap(canaries)))
    return counts


def _overlap(canaries: Mapping[str, bytes]) -> int:
    return max(map(len, canaries.values())) - 1


def _pieces(file: int, start: int, end: int, overlap: int) -> Iterator[bytes]:
    """A range of a file, each piece with the end of the one before."""
    before = b""
    for at in range(start, end, _CHUNK_BYTES):
        try:
            piece = os.pread(file, min(_CHUNK_BYTES, end - at), at)
        except OSError:  # a guard page, or memory of a device
            before = b""
            continue
        yield before + piece
        before = piece[-overlap:] if overlap else b""


def _count(counts: dict[str, int], canaries: Mapping[str, bytes], pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        for name, canary in canaries.items():
            counts[name] += piece.count(canary)
