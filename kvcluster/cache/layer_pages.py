"""The encoded blocks of each layer in the pages of its KV group, as tensors.

A layer reads the planes that it stores itself and, where layers share what is written of a block
(`codec/joined.py`), those that the first layer of its group stores for all.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvcluster.cache.encoded_pages import group_layout, layers_of, planes_of
from kvcluster.cache.pages import PageArena
from kvcluster.codec.array import ArrayCodec, Plane
from kvcluster.codec.joined import holds_planes, member_of
from kvcluster.codec.method import LayerCodec
from kvcluster.types import ModelSpec

_WORDS: Final = (torch.int64, torch.int32, torch.int16, torch.uint8)


class PagedPlane(NamedTuple):
    """One plane of the encoded blocks of one layer."""

    plane: Tensor
    """[pages, blocks, ...]"""
    words: Tensor
    """The same memory as [pages, blocks, words] of the widest integers that divide a block: blocks
    are picked word by word."""


class LayerPages(NamedTuple):
    """The encoded blocks of one layer."""

    blocks_per_page: int
    keys: list[PagedPlane]
    """Those that are read."""
    values: list[PagedPlane]
    """Likewise; none where values are part of the keys."""
    held: list[PagedPlane]
    """Those that the layer itself stores, so that over all layers each is there once."""

    def places(self, encoded_ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """Each block's page, and its place there."""
        return encoded_ids_B // self.blocks_per_page, encoded_ids_B % self.blocks_per_page


def copies(planes: Sequence[PagedPlane], pages_B: Tensor, blocks_B: Tensor) -> list[Tensor]:
    """Copies of some blocks, plane by plane."""
    return [
        words[pages_B, blocks_B].view(plane.dtype).view(-1, *plane.shape[2:])
        for plane, words in planes
    ]


def joined_layers(spec: ModelSpec, layer: int, codec: Iterable[ArrayCodec]) -> tuple[int, ...]:
    """The layers whose blocks are written together with this one's, ascending: mostly itself
    alone. It has K and V of its own."""
    member = next(filter(None, map(member_of, codec)), None)
    if member is None:
        return (layer,)
    stored = spec.storing_layers
    first = stored.index(layer) - member.place
    return stored[first : first + member.num_layers]


def lay_out(
    spec: ModelSpec, group: int, codecs: Sequence[LayerCodec], block_size: int, arena: PageArena
) -> dict[int, LayerPages]:
    """The encoded pages of a KV group, by layer; views of its arena."""
    layout = group_layout(spec, group, codecs, block_size)
    blocks = layout.blocks_per_page

    def paged(offset: int, plane: Plane) -> PagedPlane:
        word = next(word for word in _WORDS if plane.num_bytes % word.itemsize == 0)
        num_words = plane.num_bytes // word.itemsize
        return PagedPlane(
            arena.plane(offset, (blocks, *plane.shape), plane.dtype),
            arena.plane(offset, (blocks, num_words), word),
        )

    laid_out: dict[int, LayerPages] = {}
    for layer, geometry in layers_of(spec, group):
        codec, offsets = codecs[layer], iter(layout.offsets[layer])
        arrays = planes_of(codec, geometry, block_size)
        # Layers come in order, so the first one of a group is laid out before the others.
        first = laid_out.get(joined_layers(spec, layer, codec)[0])
        read: list[list[PagedPlane]] = [[], []]
        held: list[PagedPlane] = []
        for array, planes in enumerate(arrays):
            if holds_planes(codec[array]):
                read[array] = [paged(next(offsets), plane) for plane in planes]
                held += read[array]
            else:
                assert first is not None, "the first layer of a group is in the same KV group"
                read[array] = (first.keys, first.values)[array]
        laid_out[layer] = LayerPages(blocks, read[0], read[1], held)
    return laid_out
