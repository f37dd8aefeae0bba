"""Packed pages for decode kernels, written by the cache's own codecs, with every block that no row
reads poisoned.

Shape letters: those of `kvcluster_kernels.paging`.
"""

from collections.abc import Sequence

import torch
from kvcluster_kernels.paging import PagedRows
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, consecutive
from tests.kernels.decode_cases import Batch

_POISON = 0xFF
"""As bytes of any plane: NaN of float16, float32 and float8, and the largest code."""


def draw_packed(
    codec: ArrayCodec, dim: int, batch: Batch, rows: PagedRows, generator: torch.Generator
) -> list[Tensor]:
    """Planes [pages, blocks, ...] of blocks drawn at random, a few channels of which are large."""
    used = sum(batch.num_blocks)
    num_pages = -(-(used + 1) // batch.page_blocks)
    x_BKSD = torch.randn(used, batch.num_kv_heads, batch.block_size, dim, generator=generator)
    x_BKSD = x_BKSD * torch.linspace(0.1, 2, dim) + torch.linspace(-3, 1, dim)
    encoded = codec.encode(x_BKSD, consecutive(torch.arange(used), batch.block_size))
    ids_B = _ids(batch, rows)
    planes = []
    for plane in encoded:
        words = torch.full(
            (num_pages * batch.page_blocks, plane[0].numel() * plane.element_size()),
            _POISON,
            dtype=torch.uint8,
        )
        words[ids_B] = plane.flatten(1).view(torch.uint8) if plane.ndim > 1 else plane[:, None]
        # In the cache the planes of a page are side by side: a page's stride is larger than it.
        padded = torch.full((num_pages, words.shape[1] * batch.page_blocks + 64), _POISON)
        padded = padded.to(torch.uint8)
        padded[:, :-64] = words.reshape(num_pages, -1)
        in_pages = padded.to(rows.blocks_RB.device)[:, :-64].view(plane.dtype)
        planes.append(in_pages.unflatten(1, (batch.page_blocks, *plane.shape[1:])))
    return planes


def _ids(batch: Batch, rows: PagedRows) -> Tensor:
    ids: Sequence[Tensor] = [
        rows.blocks_RB[row, :count].long().cpu() for row, count in enumerate(batch.num_blocks)
    ]
    return torch.cat(list(ids))
