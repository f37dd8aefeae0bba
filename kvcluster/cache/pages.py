"""The cache memory of one rank: pages of equal size, which every way of storing divides up.

A page has room for `PAGE_BLOCKS` exact blocks of all layers of one KV group. One kind of contents
uses it at a time.
"""

import math
import mmap

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; every plane of a page starts on such a boundary."""


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class PageArena:
    """The pages of one KV group on one rank. Zeroed; a CPU commits the memory that is written."""

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device) -> None:
        assert page_bytes % ALIGNMENT == 0
        if device.type == "cpu" and num_pages * page_bytes:
            memory = _untouched(num_pages * page_bytes)
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, page_bytes)
        else:
            self._bytes = torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device=device)

    def commit(self) -> None:
        """Make the device find the memory of all pages now. Zeroes them."""
        self._bytes.zero_()

    @property
    def page_bytes(self) -> int:
        return int(self._bytes.shape[1])

    @property
    def num_bytes(self) -> int:
        return self._bytes.numel()

    def plane(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of the same array in every page: [pages, *shape], `offset` bytes into each."""
        assert offset % ALIGNMENT == 0
        num_bytes = math.prod(shape) * dtype.itemsize
        section = self._bytes[:, offset : offset + num_bytes]
        return section.view(dtype).view(-1, *shape)


def _untouched(num_bytes: int) -> mmap.mmap:
    """Zeros of the operating system's. An allocator (calloc, and so torch and NumPy) may write
    zeros into memory that it had before, which commits all of it."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
