"""The tensors of one rank's cache, written and read by slot.

The store knows nothing of sequences or owners: `SequenceMap` says which slots to touch. Slot s of
a KV group lies in page s // page_tokens; inside a page a head's slots lie together, which is how
attention reads them.

Shape letters: T tokens written, P pages, S tokens read, K KV heads, D head dimension.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster.cache.encoded_pages import layers_of, section_bytes
from kvcluster.cache.layer_pages import LayerPages, copies, joined_layers, lay_out
from kvcluster.cache.pages import PageArena
from kvcluster.codec.base import EncodedKV
from kvcluster.codec.joined import encode_together
from kvcluster.codec.method import LayerCodec
from kvcluster.codec.model_codecs import MAX_KEPT, ModelCodecs
from kvcluster.types import EXACT, PAGE_BLOCKS, LayerGeometry, ModelSpec


class Piece(NamedTuple):
    """Consecutive tokens of one layer, as a view: pages that are read whole, or part of one."""

    k_PKSD: Tensor
    v_PKSD: Tensor


def stored_arrays(kv: Piece, geometry: LayerGeometry) -> tuple[Tensor, ...]:
    """What of K and V is kept and sent: both, or K where V is part of it."""
    return kv[:1] if geometry.values_in_keys else kv


def keys_and_values(arrays: Sequence[Tensor], geometry: LayerGeometry) -> Piece:
    """K and V of what `stored_arrays` gave, whatever its tokens are since. No copy."""
    if geometry.values_in_keys:
        [k] = arrays
        return Piece(k, k[..., : geometry.value_dim])
    k, v = arrays
    return Piece(k, v)


class Places(NamedTuple):
    """Slots, as pages and what is inside them."""

    pages_T: Tensor
    offsets_T: Tensor


class KVStore:
    """All pages of one rank. A layer without K and V of its own stands for the one it reads."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        blocks_per_group: Sequence[int],
        block_size: int,
        like: Tensor,
        codecs: ModelCodecs,
    ) -> None:
        """K and V get the dtype and device of `like`, where `codecs` work too."""
        self._spec = spec
        self._codecs = codecs
        self._block_size = block_size
        self._page_tokens = PAGE_BLOCKS * block_size
        self._lay_out_once = lru_cache(MAX_KEPT)(self._lay_out)
        self._planes: list[Piece] = [Piece(like, like)] * len(spec.layers)
        self._arenas: list[PageArena] = []
        for group, num_blocks in enumerate(blocks_per_group):
            self._add_group(spec, group, -(-num_blocks // PAGE_BLOCKS), like)
        self._planes = [self._planes[spec.kv_layer_of(i)] for i in range(len(spec.layers))]

    def commit(self) -> None:
        """Take all memory now, not when it is first written. Everything stored is zeroed."""
        for arena in self._arenas:
            arena.commit()

    def _add_group(self, spec: ModelSpec, group: int, num_pages: int, like: Tensor) -> None:
        sections = [
            section_bytes(geometry, self._block_size, like.element_size())
            for _, geometry in layers_of(spec, group)
        ]
        arena = PageArena(num_pages, sum(map(sum, sections)), like.device)
        self._arenas.append(arena)
        offset = 0
        for (layer, geometry), (k_bytes, v_bytes) in zip(
            layers_of(spec, group), sections, strict=True
        ):
            heads, tokens = geometry.num_kv_heads, self._page_tokens
            arrays = [arena.plane(offset, (heads, tokens, geometry.key_dim), like.dtype)]
            if not geometry.values_in_keys:
                shape = (heads, tokens, geometry.value_dim)
                arrays.append(arena.plane(offset + k_bytes, shape, like.dtype))
            self._planes[layer] = keys_and_values(arrays, geometry)
            offset += k_bytes + v_bytes

    @property
    def spec(self) -> ModelSpec:
        """The model whose layers are stored."""
        return self._spec

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._block_size

    @property
    def page_tokens(self) -> int:
        """Slots of a page."""
        return self._page_tokens

    @property
    def codecs(self) -> ModelCodecs:
        """How blocks are written."""
        return self._codecs

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._planes[0].k_PKSD.device

    def joined_layers(self, layer: int, codec: str) -> tuple[int, ...]:
        """See `layer_pages.joined_layers`."""
        return joined_layers(self._spec, layer, self.layer_codec(layer, codec))

    def layer_codec(self, layer: int, codec: str) -> LayerCodec:
        """How blocks of the codec are written in the layer."""
        return self._codecs.layers(codec)[layer]

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, whether used or not."""
        return sum(arena.num_bytes for arena in self._arenas)

    def planes(self, layer: int) -> Piece:
        """Every slot of the layer, used or not."""
        return self._planes[layer]

    def places(self, slots_T: Tensor) -> Places:
        """Where slots of any group lie, for `write`."""
        return Places(slots_T // self._page_tokens, slots_T % self._page_tokens)

    def write(self, layer: int, places: Places, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Keep tokens in the layer's slots."""
        planes = self._stored_planes(layer)
        rows = stored_arrays(Piece(k_TKD, v_TKD), self._spec.layers[layer])
        for plane, x_TKD in zip(planes, rows, strict=True):
            plane[places.pages_T, :, places.offsets_T] = x_TKD

    def num_blocks(self, group: int, codec: str) -> int:
        """Blocks that all pages of the group hold if they hold nothing else."""
        layer, _ = next(iter(layers_of(self._spec, group)))
        num_pages = self._planes[layer].k_PKSD.shape[0]
        if codec == EXACT:
            return num_pages * PAGE_BLOCKS
        return num_pages * self._encoded_pages(layer, codec).blocks_per_page

    def blocks_per_page(self, group: int, codec: str) -> int:
        """Encoded blocks that one page of the group holds."""
        layer, _ = next(iter(layers_of(self._spec, group)))
        return self._encoded_pages(layer, codec).blocks_per_page

    def encode(
        self,
        layer: int,
        codec: str,
        encoded_ids_B: Tensor,
        kv_BKSD: Piece,
        positions_BS: Tensor,
        *,
        same_BK: Tensor | None = None,
    ) -> None:
        """Keep whole blocks in the layer's encoded blocks. `same_BK`: heads that keep the bytes
        which are there. Raises: ValueError for a layer that is written together with others."""
        encoded = self._encoded(layer, codec, kv_BKSD, positions_BS)
        if same_BK is not None:
            before = self.read_encoded(layer, codec, encoded_ids_B)
            encoded = tuple(
                _keep_heads(old, written, same_BK)
                for old, written in zip(before, encoded, strict=True)
            )
        self.write_held(layer, codec, encoded_ids_B, encoded)

    def encode_together(
        self,
        layers: Sequence[int],
        codec: str,
        encoded_ids_B: Tensor,
        blocks: Sequence[Piece],
        positions_BS: Tensor,
    ) -> None:
        """Keep whole blocks of `joined_layers`, given for each of them."""
        held = encode_together(
            [self.layer_codec(layer, codec) for layer in layers],
            [
                stored_arrays(kv_BKSD, self._spec.layers[layer])
                for layer, kv_BKSD in zip(layers, blocks, strict=True)
            ],
            positions_BS,
        )
        for layer, planes in zip(layers, held, strict=True):
            self.write_held(layer, codec, encoded_ids_B, planes)

    def write_held(
        self, layer: int, codec: str, encoded_ids_B: Tensor, planes: Sequence[Tensor]
    ) -> None:
        """Keep blocks that were encoded elsewhere, as `read_held` gave them."""
        pages = self._encoded_pages(layer, codec)
        pages_B, blocks_B = pages.places(encoded_ids_B)
        for paged, written in zip(pages.held, planes, strict=True):
            paged.plane[pages_B, blocks_B] = written

    def read_held(self, layer: int, codec: str, encoded_ids_B: Tensor) -> list[Tensor]:
        """Copies of the planes of encoded blocks that the layer itself stores: with those of the
        other layers, each is there once."""
        pages = self._encoded_pages(layer, codec)
        return copies(pages.held, *pages.places(encoded_ids_B))

    def read_encoded(self, layer: int, codec: str, encoded_ids_B: Tensor) -> list[Tensor]:
        """Copies of all planes of encoded blocks that the layer reads."""
        k_planes, v_planes = self.read_arrays(layer, codec, encoded_ids_B)
        return [*k_planes, *v_planes]

    def read_arrays(
        self, layer: int, codec: str, encoded_ids_B: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The same, those of the keys and those of the values."""
        pages = self._encoded_pages(layer, codec)
        places = pages.places(encoded_ids_B)
        return copies(pages.keys, *places), copies(pages.values, *places)

    def encoded_planes(self, layer: int, codec: str) -> tuple[list[Tensor], list[Tensor]]:
        """The planes that the layer reads of the encoded blocks of all pages, [pages, blocks, ...]:
        those of the keys and those of the values. Views."""
        pages = self._encoded_pages(layer, codec)
        return [plane for plane, _ in pages.keys], [plane for plane, _ in pages.values]

    def empty_encoded(self, layer: int, codec: str, num_blocks: int) -> list[Tensor]:
        """Room for the planes of blocks that come from another rank."""
        pages = self._encoded_pages(layer, codec)
        return [
            plane.new_empty((num_blocks, *plane.shape[2:]))
            for plane, _ in (*pages.keys, *pages.values)
        ]

    def decode(
        self, layer: int, codec: str, planes: Sequence[Tensor], positions_BS: Tensor
    ) -> tuple[Tensor, ...]:
        """k_KSD and v_KSD of encoded blocks, one after another, in the dtype of exact ones; as
        `gather`, without values that are part of the keys."""
        layer_codec = self.layer_codec(layer, codec)
        num_key_planes = len(self._encoded_pages(layer, codec).keys)
        dtype = self._planes[layer].k_PKSD.dtype
        arrays = [layer_codec.keys.decode(planes[:num_key_planes], positions_BS)]
        if not self._spec.layers[layer].values_in_keys:
            arrays.append(layer_codec.values.decode(planes[num_key_planes:], positions_BS))
        return tuple(in_line(x_BKSD.to(dtype)) for x_BKSD in arrays)

    def round_trip(
        self, layer: int, codec: str, kv_BKSD: Piece, positions_BS: Tensor
    ) -> tuple[Tensor, ...]:
        """What `decode` gives of blocks after `encode`."""
        encoded = self._encoded(layer, codec, kv_BKSD, positions_BS)
        return self.decode(layer, codec, encoded, positions_BS)

    def _encoded(
        self, layer: int, codec: str, kv_BKSD: Piece, positions_BS: Tensor
    ) -> tuple[Tensor, ...]:
        """All planes of some blocks, those of the keys first."""
        arrays = stored_arrays(kv_BKSD, self._spec.layers[layer])
        # Where there are no values of their own, their codec is left over.
        coded = zip(self.layer_codec(layer, codec), arrays, strict=False)
        return tuple(plane for array, x in coded for plane in array.encode(x, positions_BS))

    def _encoded_pages(self, layer: int, codec: str) -> LayerPages:
        group = self._spec.group_of(self._spec.layers[layer])
        return self._lay_out_once(group, codec)[self._spec.kv_layer_of(layer)]

    def _lay_out(self, group: int, codec: str) -> dict[int, LayerPages]:
        codecs, arena = self._codecs.layers(codec), self._arenas[group]
        return lay_out(self._spec, group, codecs, self._block_size, arena)

    def pieces(self, layer: int, runs: Sequence[slice]) -> list[Piece]:
        """Views of the tokens of the runs, in order."""
        planes = self._planes[layer]
        return [
            Piece(*(plane[pages, :, slots] for plane in planes))
            for run in runs
            for pages, slots in self._split(run)
        ]

    def gather(self, layer: int, runs: Sequence[slice]) -> EncodedKV:
        """k_KSD and v_KSD of the tokens of the runs, without values that are part of the keys;
        views where they lie in one piece."""
        geometry = self._spec.layers[layer]
        pieces = [stored_arrays(piece, geometry) for piece in self.pieces(layer, runs)]
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

    def read_blocks(self, layer: int, block_ids_B: Tensor, heads: slice = slice(None)) -> Piece:
        """Copies of exact blocks, k_BKSD and v_BKSD, of all KV heads or some."""
        pages_B, blocks_B = block_ids_B // PAGE_BLOCKS, block_ids_B % PAGE_BLOCKS
        return Piece(
            *(
                plane.view(*plane.shape[:2], PAGE_BLOCKS, self._block_size, plane.shape[3])[
                    pages_B, heads, blocks_B
                ]
                for plane in self._planes[layer]
            )
        )

    def empty(self, layer: int, num_tokens: int) -> EncodedKV:
        """Room for `num_tokens` tokens of the layer that come from another rank."""
        return EncodedKV(
            tuple(
                plane.new_empty((plane.shape[1], num_tokens, plane.shape[3]))
                for plane in self._stored_planes(layer)
            )
        )

    def _stored_planes(self, layer: int) -> tuple[Tensor, ...]:
        return stored_arrays(self._planes[layer], self._spec.layers[layer])

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


def in_blocks(x_KSD: Tensor, block_size: int) -> Tensor:
    """x_BKSD of tokens in line that are whole blocks."""
    num_heads, num_tokens, dim = x_KSD.shape
    return x_KSD.reshape(num_heads, num_tokens // block_size, block_size, dim).transpose(0, 1)


def in_line(x_PKSD: Tensor) -> Tensor:
    """x_KSD, the pages one after another: a view of one page, a copy of several."""
    return x_PKSD[0] if len(x_PKSD) == 1 else x_PKSD.transpose(0, 1).flatten(1, 2)


def _keep_heads(before: Tensor, after: Tensor, same_BK: Tensor) -> Tensor:
    """A plane of some blocks with the bytes of these heads as they were before. Planes that are not
    of single heads are as before where all heads are the same."""
    is_by_head = after.ndim > 1 and after.shape[1] == same_BK.shape[1]
    same = same_BK if is_by_head else same_BK.all(dim=1)
    kept = after.clone()
    kept[same] = before[same]
    return kept
