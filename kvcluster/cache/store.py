"""The tensors of one rank's cache, written and read by slot.

The store knows nothing of sequences or owners: `SequenceMap` says which slots to touch. Slot s of
a KV group lies in page s // page_tokens; inside a page a head's slots lie together, which is how
attention reads them.

Shape letters: T tokens written, P pages, S tokens read, K KV heads, D head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster.cache.pages import PAGE_BLOCKS, PageArena, aligned
from kvcluster.codec.base import EncodedKV
from kvcluster.types import LayerGeometry, ModelSpec


class Piece(NamedTuple):
    """Consecutive tokens of one layer, as a view: pages that are read whole, or part of one."""

    k_PKSD: Tensor
    v_PKSD: Tensor


class KVStore:
    """All pages of one rank."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        blocks_per_group: Sequence[int],
        block_size: int,
        like: Tensor,
    ) -> None:
        """K and V get the dtype and device of `like`."""
        self._page_tokens = PAGE_BLOCKS * block_size
        self._planes: list[Piece] = [Piece(like, like)] * len(spec.layers)
        self._arenas: list[PageArena] = []
        for group, num_blocks in enumerate(blocks_per_group):
            layers = [n for n, layer in enumerate(spec.layers) if spec.group_of(layer) == group]
            self._add_group(spec, layers, -(-num_blocks // PAGE_BLOCKS), like)

    def _add_group(
        self, spec: ModelSpec, layers: Sequence[int], num_pages: int, like: Tensor
    ) -> None:
        offsets: list[tuple[int, int]] = []
        page_bytes = 0
        for layer in layers:
            section = [
                aligned(size * self._page_tokens * like.element_size())
                for size in _elements_per_token(spec.layers[layer])
            ]
            offsets.append((page_bytes, page_bytes + section[0]))
            page_bytes += sum(section)
        arena = PageArena(num_pages, page_bytes, like.device)
        self._arenas.append(arena)
        for layer, (k_offset, v_offset) in zip(layers, offsets, strict=True):
            geometry = spec.layers[layer]
            heads, tokens = geometry.num_kv_heads, self._page_tokens
            self._planes[layer] = Piece(
                arena.plane(k_offset, (heads, tokens, geometry.key_dim), like.dtype),
                arena.plane(v_offset, (heads, tokens, geometry.value_dim), like.dtype),
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, whether used or not."""
        return sum(arena.num_bytes for arena in self._arenas)

    def planes(self, layer: int) -> Piece:
        """Every slot of the layer, used or not."""
        return self._planes[layer]

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Keep tokens in the layer's slots."""
        pages_T, offsets_T = slots_T // self._page_tokens, slots_T % self._page_tokens
        for plane, x_TKD in zip(self._planes[layer], (k_TKD, v_TKD), strict=True):
            plane[pages_T, :, offsets_T] = x_TKD

    def pieces(self, layer: int, runs: Sequence[slice]) -> list[Piece]:
        """Views of the tokens of the runs, in order."""
        planes = self._planes[layer]
        return [
            Piece(*(plane[pages, :, slots] for plane in planes))
            for run in runs
            for pages, slots in self._split(run)
        ]

    def gather(self, layer: int, runs: Sequence[slice]) -> EncodedKV:
        """k_KSD and v_KSD of the tokens of the runs; views where they lie in one piece."""
        pieces = self.pieces(layer, runs)
        if not pieces:
            return self.empty(layer, 0)
        return EncodedKV(
            tuple(
                in_line(planes[0])
                if len(planes) == 1
                else torch.cat([in_line(plane) for plane in planes], dim=1)
                for planes in zip(*pieces, strict=True)
            )
        )

    def empty(self, layer: int, num_tokens: int) -> EncodedKV:
        """Room for `num_tokens` tokens of the layer that come from another rank."""
        return EncodedKV(
            tuple(
                plane.new_empty((plane.shape[1], num_tokens, plane.shape[3]))
                for plane in self._planes[layer]
            )
        )

    def _split(self, run: slice) -> list[tuple[slice, slice]]:
        """The run as parts of single pages and rows of whole ones."""
        size = self._page_tokens
        parts: list[tuple[slice, slice]] = []
        start = run.start
        while start < run.stop:
            page, offset = divmod(start, size)
            whole = (run.stop - start) // size if offset == 0 else 0
            if whole:
                parts.append((slice(page, page + whole), slice(0, size)))
                start += whole * size
            else:
                end = min(run.stop, (page + 1) * size)
                parts.append((slice(page, page + 1), slice(offset, end - page * size)))
                start = end
        return parts


def in_line(x_PKSD: Tensor) -> Tensor:
    """x_KSD, the pages one after another: a view of one page, a copy of several."""
    return x_PKSD[0] if len(x_PKSD) == 1 else x_PKSD.transpose(0, 1).flatten(1, 2)


def _elements_per_token(geometry: LayerGeometry) -> tuple[int, int]:
    return geometry.num_kv_heads * geometry.key_dim, geometry.num_kv_heads * geometry.value_dim
