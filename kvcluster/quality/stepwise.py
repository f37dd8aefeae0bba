"""Attention over a cache in which layers are written together, as its definition.

A row of such a cache reads, encoded, what its own layer and later ones computed of earlier
positions, so no pass over a whole sequence, layer by layer, can define it. Here a sequence comes in
runs of rows that each lie in one step of `ExactRegion`, and a run passes through all layers before
the next one does: what is old enough by then is encoded between them.

With one block a step this is what `kvcluster.quality.strict` defines, for every codec.

Shape letters: T query tokens of a run or of the sequence, S keys or tokens of a block, H query
heads, K KV heads, D head dimension, B blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcluster.attention.local import attend, visible, visible_blocks
from kvcluster.attention.partial import merge_sinks
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.layer_pages import joined_layers
from kvcluster.cache.store import in_blocks
from kvcluster.codec.array import ArrayCodec, consecutive
from kvcluster.codec.joined import encode_together
from kvcluster.quality.stored import StoredBytes
from kvcluster.quality.strict import KeysValues, LayerCodecs, stored_dims
from kvcluster.types import LayerGeometry, ModelSpec


@dataclass(slots=True)
class _LayerCache:
    """K and V of all positions so far."""

    written: KeysValues
    read: KeysValues
    """The same, in which encoded blocks are as they are restored."""
    num_encoded: int = 1
    """Blocks that are no longer exact, counted with the first one, which stays exact."""
    block_bytes: dict[int, int] = field(default_factory=dict)
    """By array, 0 for keys and 1 for values: what the layer stores of an encoded block."""


class StepwiseAttention:
    """A `LayerAttention` for one sequence whose positions come in order, in runs of at most
    `run_tokens` that each lie in one step. Use one per sequence.

    Computes on the device of its tensors, in float32, and keeps all of K and V twice.
    """

    def __init__(
        self,
        spec: ModelSpec,
        codecs: Sequence[LayerCodecs],
        exact: ExactRegion,
        *,
        block_size: int,
        recent_blocks: int | None = None,
    ) -> None:
        """`codecs` has one for each layer of the model. `recent_blocks`: in layers without a
        window, rows of block j read block 0 and the blocks after j - recent_blocks; None: all."""
        self._spec = spec
        self._codecs = codecs
        self._exact = exact
        self._block_size = block_size
        self._recent_blocks = recent_blocks
        self._layers: dict[int, _LayerCache] = {}

    @property
    def run_tokens(self) -> int:
        """Rows of one step: runs begin at multiples of it."""
        return (self._exact.step_blocks or 1) * self._block_size

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """See `LayerAttention`. Raises: ValueError for rows of more than one step, and from a codec
        that cannot encode the blocks."""
        geometry = self._spec.layers[layer]
        if geometry.kv_layer is None:
            self._encode_old(layer)
            self._append(layer, k_TKD, v_TKD)
        cache = self._layers[self._spec.kv_layer_of(layer)]
        end = cache.written.k_KTD.shape[1]
        start = end - len(q_THD)
        if start // self.run_tokens != (end - 1) // self.run_tokens:
            raise ValueError(f"rows {start} to {end - 1} are not of one step")
        mask_TS = self._mask(torch.arange(start, end, device=q_THD.device), geometry)
        partial = attend(q_THD, *cache.read, geometry, mask_TS)
        if sinks_H is not None:
            partial = merge_sinks(partial, sinks_H)
        return partial.out_THD.to(q_THD.dtype)

    def stored(self) -> StoredBytes:
        """Bytes of all layers, as the last token reads them."""
        total = StoredBytes()
        for layer, cache in self._layers.items():
            geometry = self._spec.layers[layer]
            total += self._stored(self._codecs[layer], cache, geometry)
        return total

    def read_share(self) -> float:
        """Of the keys before a query, those that it reads: all."""
        return 1.0

    def _append(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        own = [x.transpose(0, 1).to(torch.float32, copy=True) for x in (k_TKD, v_TKD)]
        before = self._layers.get(layer)
        if before is None:
            copied = KeysValues(*(x_KTD.clone() for x_KTD in own))
            self._layers[layer] = _LayerCache(KeysValues(*own), copied)
        else:
            before.written = before.written.followed_by(KeysValues(*own))
            before.read = before.read.followed_by(KeysValues(*own))

    def _mask(self, positions_T: Tensor, geometry: LayerGeometry) -> Tensor:
        positions_S = torch.arange(int(positions_T[-1]) + 1, device=positions_T.device)
        mask_TS = visible(positions_T, positions_S, geometry.window)
        if geometry.window is None and self._recent_blocks is not None:
            blocks_T, blocks_S = (x // self._block_size for x in (positions_T, positions_S))
            mask_TS &= visible_blocks(blocks_T, blocks_S, self._recent_blocks)
        return mask_TS

    def _encode_old(self, layer: int) -> None:
        """Before a run's first rows in a group of layers: encode what they do not read exact. All
        layers of the group have it, and those that read the K and V of one of them are done."""
        written = [codec for codec in self._codecs[layer] if codec is not None]
        layers = joined_layers(self._spec, layer, written)
        if layer != layers[0] or layer not in self._layers:
            return
        cache = self._layers[layer]
        next_block = cache.written.k_KTD.shape[1] // self._block_size
        blocks = range(cache.num_encoded, self._exact.first_block(next_block))
        if not blocks:
            return
        cache.num_encoded = blocks.stop
        for array, (codec, _) in enumerate(
            stored_dims(self._codecs[layers[0]], self._spec.layers[layers[0]])
        ):
            if codec is not None:
                codecs = [self._codecs[layer][array] for layer in layers]
                self._round_trip(layers, array, [c for c in codecs if c is not None], blocks)

    def _round_trip(
        self, layers: Sequence[int], array: int, codecs: Sequence[ArrayCodec], blocks: range
    ) -> None:
        """Replace these blocks of keys (array 0) or values (1) by what is restored of them."""
        size = self._block_size
        rows = slice(blocks.start * size, blocks.stop * size)
        caches = [self._layers[layer] for layer in layers]
        written = [in_blocks(cache.written[array][:, rows], size).contiguous() for cache in caches]
        starts_B = torch.arange(rows.start, rows.stop, size, device=written[0].device)
        positions_BS = consecutive(starts_B, size)
        held = encode_together(
            [[codec] for codec in codecs], [[x_BKSD] for x_BKSD in written], positions_BS
        )
        for layer, cache, codec, planes in zip(layers, caches, codecs, held, strict=True):
            read = planes or held[0]
            restored_KSD = codec.decode(read, positions_BS).transpose(0, 1).flatten(1, 2)
            cache.read[array][:, rows] = restored_KSD
            if array == 0 and self._spec.layers[layer].values_in_keys:
                cache.read.v_KTD[:, rows] = restored_KSD[..., : cache.read.v_KTD.shape[2]]
            cache.block_bytes[array] = sum(plane.nbytes for plane in planes) // len(blocks)

    def _stored(
        self, codecs: LayerCodecs, cache: _LayerCache, geometry: LayerGeometry
    ) -> StoredBytes:
        size, num_heads = self._block_size, geometry.num_kv_heads
        num_tokens = cache.written.k_KTD.shape[1]
        own = (num_tokens - 1) // size
        entries = range(own + 1)
        num_dropped = 0
        if geometry.window is not None:
            # Blocks that left a window of the model's own are no part of what is compared.
            entries = range(max(0, num_tokens - geometry.window) // size, own + 1)
        elif self._recent_blocks is not None:
            num_dropped = max(0, own - self._recent_blocks)
        num_seen = num_tokens - entries.start * size
        encoded = range(max(1 + num_dropped, entries.start), self._exact.first_block(own))
        total = StoredBytes()
        for array, (codec, dim) in enumerate(stored_dims(codecs, geometry)):
            num_blocks = len(encoded) if codec is not None else 0
            num_exact = num_seen - (num_dropped + num_blocks) * size
            total += StoredBytes(
                num_tokens=num_tokens,
                exact_elements=num_exact * num_heads * dim,
                encoded_elements=num_blocks * size * num_heads * dim,
                encoded_bytes=num_blocks * cache.block_bytes.get(array, 0),
                dropped_elements=num_dropped * size * num_heads * dim,
            )
        return total
