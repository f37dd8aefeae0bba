"""Attention over a compressed cache, as its definition, for one whole sequence in one pass.

What a query reads exactly depends on absolute positions alone, never on chunks: with blocks of S
tokens, the query at position p reads exactly the keys of block p // S (up to itself), those of the
`lag` blocks before it, and those of the first block, which holds the attention sinks. Of all other
blocks it reads what the codec restores. Where a model attends is as ever: causality, windows,
soft-caps and sinks are those of `kvcluster.attention.local`.

Shape letters: B blocks, T tokens of the sequence, H query heads, K KV heads, S tokens of a block
or keys, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvcluster.attention.local import attend, attend_causal, visible
from kvcluster.attention.partial import Partial, merge, merge_sinks
from kvcluster.codec.array import ArrayCodec, BlockShape
from kvcluster.quality.stored import StoredBytes
from kvcluster.types import LayerGeometry, ModelSpec

_TILE_TOKENS: Final = 512
"""Queries that attend at one time: their mask over their own blocks is all that is held beside
the keys."""
_TILE_TOKENS_ON_GPU: Final = 2048
"""Starting so many small operations takes longer than the wasted part of a larger mask."""
_ENCODED_ELEMENTS: Final = 1 << 21
"""Elements that one call of a codec gets: what it needs on the way may be many times as much."""


class LayerCodecs(NamedTuple):
    """How one layer's blocks are stored. None: as they are."""

    keys: ArrayCodec | None
    values: ArrayCodec | None


def stored_dims(
    codecs: LayerCodecs, geometry: LayerGeometry
) -> list[tuple[ArrayCodec | None, int]]:
    """Codec and head dimension of the keys and, unless they are part of them, of the values."""
    dims = (geometry.key_dim, geometry.value_dim)
    stored = list(zip(codecs, dims, strict=True))
    return stored[:1] if geometry.values_in_keys else stored


CodecsOfLayer = Callable[[int], LayerCodecs | None]
"""The codecs of a layer, by its index in `ModelSpec.layers`. None: both exact."""

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with (layer, q_THD, k_TKD, v_TKD) before anything is encoded. The model may reuse the
memory afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactTokens:
    """Which blocks are read as they were written."""

    block_size: int
    exact_sinks: bool = True
    """The first block is never encoded."""
    lag: int = 0
    """Blocks before a query's own that are not encoded yet."""

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.lag < 0:
            raise ValueError(
                f"want block_size >= 1 and lag >= 0, got {self.block_size} and {self.lag}"
            )

    def encoded_blocks(self, num_tokens: int) -> range:
        """Blocks that some query of a sequence reads encoded."""
        return range(int(self.exact_sinks), (num_tokens - 1) // self.block_size - self.lag)


class StrictAttention:
    """A `LayerAttention` for one forward pass over one sequence, positions 0 to T - 1 in order.

    Use one per pass. Computes on the device of its tensors, in float32. Memory beside the keys
    and values: their restored copies for one layer, and the logits of one tile of queries.
    """

    def __init__(
        self,
        spec: ModelSpec,
        codecs_of_layer: CodecsOfLayer,
        exact: ExactTokens,
        observer: Observer | None = None,
    ) -> None:
        self._spec = spec
        self._codecs_of_layer = codecs_of_layer
        self._exact = exact
        self._observer = observer
        self._stored = StoredBytes()

    def stored(self) -> StoredBytes:
        """Bytes of the layers attended so far."""
        return self._stored

    def read_share(self) -> float:
        """Of the keys before a query, those that it reads: all."""
        return 1.0

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """See `LayerAttention`. Raises: ValueError from a codec that cannot encode the blocks, or
        whose planes are not those it declared."""
        if self._observer is not None:
            self._observer(layer, q_THD, k_TKD, v_TKD)
        geometry = self._spec.layers[layer]
        codecs = self._codecs_of_layer(layer) or LayerCodecs(None, None)
        written = KeysValues(k_TKD.transpose(0, 1), v_TKD.transpose(0, 1))
        k_KTD = self._read(written.k_KTD, codecs.keys, geometry)
        if geometry.values_in_keys:
            read = KeysValues(k_KTD, k_KTD[..., : geometry.value_dim])
        else:
            read = KeysValues(k_KTD, self._read(written.v_KTD, codecs.values, geometry))
        if codecs == LayerCodecs(None, None):
            partial = _attend_exact(q_THD, written, geometry)
        else:
            partial = attend_mixed(q_THD, written, read, geometry, self._exact)
        if sinks_H is not None:
            partial = merge_sinks(partial, sinks_H)
        return partial.out_THD.to(q_THD.dtype)

    def _read(self, x_KTD: Tensor, codec: ArrayCodec | None, geometry: LayerGeometry) -> Tensor:
        """The array as later blocks read it. Counts its bytes."""
        num_heads, num_tokens, dim = x_KTD.shape
        visible_from = max(0, num_tokens - (geometry.window or num_tokens))
        size = self._exact.block_size
        blocks = self._exact.encoded_blocks(num_tokens) if codec is not None else range(0)
        kept = [block for block in blocks if (block + 1) * size > visible_from]
        first_kept = visible_from // size * size
        num_encoded = len(kept) * size * num_heads * dim
        num_all = (num_tokens - first_kept) * num_heads * dim
        counted = StoredBytes(
            num_tokens=num_tokens,
            exact_elements=num_all - num_encoded,
            encoded_elements=num_encoded,
        )
        if codec is None or not blocks:
            self._count(geometry, counted)
            return x_KTD
        bytes_per_block = sum(plane.num_bytes for plane in codec.planes(_shape(x_KTD, size)))
        encoded_bytes = len(kept) * bytes_per_block
        self._count(geometry, counted + StoredBytes(encoded_bytes=encoded_bytes))
        return restored(x_KTD, codec, blocks, size)

    def _count(self, geometry: LayerGeometry, stored: StoredBytes) -> None:
        if geometry.kv_layer is None:
            self._stored += stored


def restored(
    x_KTD: Tensor,
    codec: ArrayCodec,
    blocks: range,
    block_size: int,
    positions_T: Tensor | None = None,
) -> Tensor:
    """A float32 copy in which these whole blocks went through the codec. `positions_T`: of the
    tokens; None: each is at its place.

    Raises: ValueError from a codec that cannot encode such blocks, or whose planes are not those
    it declared: bytes are counted from the declaration.
    """
    if positions_T is None:
        positions_T = torch.arange(x_KTD.shape[1], device=x_KTD.device)
    shape = _shape(x_KTD, block_size)
    declared = [(plane.shape, plane.dtype) for plane in codec.planes(shape)]
    out_KTD = x_KTD.to(torch.float32, copy=True)
    step = max(1, _ENCODED_ELEMENTS // (shape.num_heads * shape.num_tokens * shape.dim))
    for first in range(blocks.start, blocks.stop, step):
        last = min(first + step, blocks.stop)
        rows = slice(first * block_size, last * block_size)
        x_BKSD = x_KTD[:, rows].reshape(-1, last - first, block_size, shape.dim).transpose(0, 1)
        positions_BS = positions_T[rows].reshape(-1, block_size)
        planes = codec.encode(x_BKSD.contiguous(), positions_BS)
        written = [(tuple(plane.shape[1:]), plane.dtype) for plane in planes]
        if written != declared:
            raise ValueError(f"codec declares planes {declared} and writes {written}")
        out_KTD[:, rows] = codec.decode(planes, positions_BS).transpose(0, 1).flatten(1, 2)
    return out_KTD


class KeysValues(NamedTuple):
    """Keys and values of one layer, head-major."""

    k_KTD: Tensor
    v_KTD: Tensor

    def rows(self, first: int, last: int) -> "KeysValues":
        return KeysValues(self.k_KTD[:, first:last], self.v_KTD[:, first:last])

    def followed_by(self, other: "KeysValues") -> "KeysValues":
        return KeysValues(
            torch.cat((self.k_KTD, other.k_KTD), dim=1), torch.cat((self.v_KTD, other.v_KTD), dim=1)
        )


def attend_mixed(
    q_THD: Tensor,
    written: KeysValues,
    read: KeysValues,
    geometry: LayerGeometry,
    exact: ExactTokens,
) -> Partial:
    """Causal attention in which near blocks are as `written` and the others as `read`.

    A tile of queries attends in one go to the keys that are far from all of them, and to the rest,
    each key in both forms, under a mask that shows one of the two.
    """
    tile = max(1, _tile_tokens(q_THD) // exact.block_size) * exact.block_size
    tiles = []
    for first in range(0, q_THD.shape[0], tile):
        q_tile = q_THD[first : first + tile]
        last = first + q_tile.shape[0]
        positions_T = torch.arange(first, last, device=q_THD.device)
        low = 0 if geometry.window is None else max(0, first - geometry.window + 1)
        near = max(low, first - exact.lag * exact.block_size)
        far_mask_TS = None
        if geometry.window is not None:
            far_mask_TS = _visible(positions_T, low, near, geometry)
        seen_TS = _visible(positions_T, near, last, geometry)
        is_near_TS = _is_near(positions_T, near, last, exact)
        near_mask_TS = torch.cat((seen_TS & ~is_near_TS, seen_TS & is_near_TS), dim=1)
        around = read.rows(near, last).followed_by(written.rows(near, last))
        tiles.append(
            merge(
                attend(q_tile, *read.rows(low, near), geometry, far_mask_TS),
                attend(q_tile, *around, geometry, near_mask_TS),
            )
        )
    return _joined(tiles)


def _attend_exact(q_THD: Tensor, written: KeysValues, geometry: LayerGeometry) -> Partial:
    tile = _tile_tokens(q_THD)
    tiles = []
    for first in range(0, q_THD.shape[0], tile):
        q_tile = q_THD[first : first + tile]
        past = written.rows(0, first + q_tile.shape[0])
        tiles.append(attend_causal(q_tile, *past, geometry, first))
    return _joined(tiles)


def _tile_tokens(q_THD: Tensor) -> int:
    return _TILE_TOKENS if q_THD.device.type == "cpu" else _TILE_TOKENS_ON_GPU


def _visible(positions_T: Tensor, first: int, last: int, geometry: LayerGeometry) -> Tensor:
    positions_S = torch.arange(first, last, device=positions_T.device)
    return visible(positions_T, positions_S, geometry.window)


def _is_near(positions_T: Tensor, first: int, last: int, exact: ExactTokens) -> Tensor:
    blocks_S = torch.arange(first, last, device=positions_T.device) // exact.block_size
    return blocks_S[None, :] >= (positions_T // exact.block_size - exact.lag)[:, None]


def _joined(tiles: list[Partial]) -> Partial:
    return Partial(
        torch.cat([tile.out_THD for tile in tiles]), torch.cat([tile.lse_TH for tile in tiles])
    )


def _shape(x_KTD: Tensor, block_size: int) -> BlockShape:
    return BlockShape(x_KTD.shape[0], block_size, x_KTD.shape[2])
