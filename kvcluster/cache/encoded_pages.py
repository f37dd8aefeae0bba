"""How the encoded blocks of a KV group lie in its pages.

A page holds as many blocks as fit, layer by layer, plane by plane, each plane's blocks together.
Block b is block b % blocks_per_page of page b // blocks_per_page.
"""

from collections.abc import Mapping, Sequence

from kvcluster.cache.pages import aligned
from kvcluster.codec.array import BlockShape, Plane
from kvcluster.codec.registry import LayerCodec
from kvcluster.types import LayerGeometry


def planes_of(codec: LayerCodec, geometry: LayerGeometry, block_size: int) -> tuple[Plane, ...]:
    """What one block becomes: the planes of its keys, then those of its values.

    Raises: ValueError where the codec cannot encode such blocks.
    """
    heads = geometry.num_kv_heads
    return (
        *codec.keys.planes(BlockShape(heads, block_size, geometry.key_dim)),
        *codec.values.planes(BlockShape(heads, block_size, geometry.value_dim)),
    )


class EncodedLayout:
    """Where each plane of each layer begins in a page."""

    def __init__(self, planes_by_layer: Mapping[int, Sequence[Plane]], page_bytes: int) -> None:
        """Raises: ValueError when not even one block fits a page."""
        sizes = [plane.num_bytes for planes in planes_by_layer.values() for plane in planes]
        blocks = page_bytes // sum(sizes)
        while blocks and sum(aligned(blocks * size) for size in sizes) > page_bytes:
            blocks -= 1
        if not blocks:
            raise ValueError(
                f"an encoded block takes {sum(sizes)} bytes, more than a page of {page_bytes}: "
                "blocks are too small for this codec"
            )
        self.blocks_per_page = blocks
        self.offsets: dict[int, list[int]] = {}
        offset = 0
        for layer, planes in planes_by_layer.items():
            self.offsets[layer] = []
            for plane in planes:
                self.offsets[layer].append(offset)
                offset += aligned(blocks * plane.num_bytes)
