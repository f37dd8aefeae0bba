"""How the encoded blocks of a KV group lie in its pages.

A page holds as many blocks as fit, layer by layer, plane by plane, each plane's blocks together.
Block b is block b % blocks_per_page of page b // blocks_per_page.
"""

from collections.abc import Iterable, Mapping, Sequence

from kvcluster.cache.pages import aligned
from kvcluster.codec.array import BlockShape, Plane
from kvcluster.codec.joined import holds_planes
from kvcluster.codec.method import LayerCodec
from kvcluster.types import PAGE_BLOCKS, LayerGeometry, ModelSpec


def planes_of(
    codec: LayerCodec, geometry: LayerGeometry, block_size: int
) -> tuple[tuple[Plane, ...], ...]:
    """What is read of one block: the planes of its keys, and those of its values, unless these are
    part of the keys.

    Raises: ValueError where the codec cannot encode such blocks.
    """
    heads = geometry.num_kv_heads
    keys = codec.keys.planes(BlockShape(heads, block_size, geometry.key_dim))
    if geometry.values_in_keys:
        return (tuple(keys),)
    values = codec.values.planes(BlockShape(heads, block_size, geometry.value_dim))
    return tuple(keys), tuple(values)


def held_planes(codec: LayerCodec, geometry: LayerGeometry, block_size: int) -> tuple[Plane, ...]:
    """Of those, what the layer itself stores: all, or what the first layer of its group does not
    store for it. Raises: as `planes_of`."""
    arrays = planes_of(codec, geometry, block_size)
    return tuple(
        plane
        for array, planes in zip(codec, arrays, strict=False)
        if holds_planes(array)
        for plane in planes
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


def section_bytes(
    geometry: LayerGeometry, block_size: int, bytes_per_element: int
) -> tuple[int, int]:
    """What the exact keys, and the exact values, of one layer take in a page."""
    tokens = PAGE_BLOCKS * block_size * geometry.num_kv_heads * bytes_per_element
    own_values = 0 if geometry.values_in_keys else geometry.value_dim
    return aligned(tokens * geometry.key_dim), aligned(tokens * own_values)


def layers_of(spec: ModelSpec, group: int) -> Iterable[tuple[int, LayerGeometry]]:
    """The layers of a KV group that store K and V, with their indices."""
    return (
        (index, spec.layers[index])
        for index in spec.storing_layers
        if spec.group_of(spec.layers[index]) == group
    )


def blocks_per_page(
    spec: ModelSpec, layers: Sequence[LayerCodec], block_size: int
) -> tuple[int, ...]:
    """How many blocks of a codec, given layer by layer, a page of each KV group holds. The ranks
    lay out their pages alike. Raises: ValueError where the codec cannot encode the blocks."""
    return tuple(
        group_layout(spec, group, layers, block_size).blocks_per_page
        for group in range(len(spec.windows))
    )


def group_layout(
    spec: ModelSpec, group: int, layers: Sequence[LayerCodec], block_size: int
) -> EncodedLayout:
    """The encoded pages of one group. Raises: ValueError where the codec cannot encode them."""
    in_group = list(layers_of(spec, group))
    return EncodedLayout(
        {index: held_planes(layers[index], geometry, block_size) for index, geometry in in_group},
        sum(
            sum(section_bytes(geometry, block_size, spec.bytes_per_element))
            for _, geometry in in_group
        ),
    )
