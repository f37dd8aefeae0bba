"""What a process, folder or shared memory still holds of bytes that should be gone (Linux).

Only what is there is read: Ray reserves gigabytes of shared memory that nothing was ever written
to, and a look at them through a process would allocate them.
"""

import os
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from kvcluster.config import ClusterConfig
from kvcluster.engine.api import TokenChunk
from kvcluster.engine.context_api import ContextRequest
from kvcluster.types import DEFAULT_TENANT
from tests.architectures import VOCAB_SIZE
from tests.served_model import served_model
from tests.thread_executor import running_engine

_NUM_TOKENS, _CANARY_BYTES = 240, 32
_CHUNK_BYTES = 8 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# A line of /proc/PID/maps: `7f2c4a000000-7f2c5a000000 rw-p 00000000 00:00 0  [heap]`. Memory that
# nobody can write, which is that of programs, holds nothing of a prompt.
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw", re.MULTILINE)


def random_ids(seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, VOCAB_SIZE) for _ in range(_NUM_TOKENS)]


async def canaries_of(ids: list[int], config: ClusterConfig, policy: str = "") -> dict[str, bytes]:
    """What the tiny model's server has of a prompt: token ids in both widths, and bytes of every
    rank's cache, stored here by the same model. The names of the latter begin with `cache of rank`
    and its number."""
    found = {
        "u32 ids": array("I", ids[100:116]).tobytes(),
        "i64 ids": array("q", ids[100:116]).tobytes(),
    }
    torch.set_num_threads(1)
    async with running_engine(served_model("llama"), config) as (service, executor):
        opened = await service.open_context(ContextRequest(context_id="book", policy=policy))
        chunk = TokenChunk(0, array("I", ids).tobytes())
        await service.append_context(DEFAULT_TENANT, "book", opened.upload, chunk)
        await service.finish_context(DEFAULT_TENANT, "book", opened.upload)
        for rank, runner in enumerate(executor.runners):
            for layer, arena in enumerate(runner._store._arenas):
                held = arena._bytes.flatten().view(torch.uint8).numpy().tobytes()
                places = range(0, len(held), _CANARY_BYTES)
                pieces = (held[place : place + _CANARY_BYTES] for place in places)
                telling = [piece for piece in pieces if len(set(piece)) > 20]
                found |= {
                    f"cache of rank {rank}, arena {layer}, {place}": telling[place]
                    for place in range(3, len(telling), max(8, len(telling) // 3))
                }
    return found


def found_in_process(pid: int, canaries: Mapping[str, bytes]) -> dict[str, int]:
    """How often each canary is in what a process has written, shared memory included."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    counts = dict.fromkeys(canaries, 0)
    with (
        Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory,
        Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pages,
    ):
        for first, last in _MAPPING.findall(maps):
            for start, end in _resident(pages.fileno(), int(first, 16), int(last, 16)):
                _count(counts, canaries, _pieces(memory.fileno(), start, end, _overlap(canaries)))
    return counts


def found_in_files(folders: Iterable[Path], canaries: Mapping[str, bytes]) -> dict[str, int]:
    """The same of every regular file below some folders."""
    counts = dict.fromkeys(canaries, 0)
    for file in (file for folder in folders for file in folder.rglob("*")):
        if file.is_symlink() or not file.is_file():
            continue
        with suppress(FileNotFoundError), file.open("rb") as content:
            for start, end in _written(content.fileno()):
                pieces = _pieces(content.fileno(), start, end, _overlap(canaries))
                _count(counts, canaries, pieces)
    return counts


def _overlap(canaries: Mapping[str, bytes]) -> int:
    return max(map(len, canaries.values())) - 1


def _resident(pages: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a mapping that have memory. `pages`: the process's pagemap, in which the two
    highest of a page's 64 bits say that it is in memory or swapped out."""
    size = (end - start) // _PAGE_BYTES
    entries = os.pread(pages, 8 * size, start // _PAGE_BYTES * 8)
    is_there = np.zeros(size + 2, dtype=np.int8)
    is_there[1 : 1 + len(entries) // 8] = np.frombuffer(entries, dtype=np.uint64) >> 62 != 0
    edges = np.flatnonzero(np.diff(is_there)) * _PAGE_BYTES + start
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _written(file: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes."""
    at, size = 0, os.fstat(file).st_size
    while at < size:
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        at = os.lseek(file, start, os.SEEK_HOLE)
        yield start, at


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
