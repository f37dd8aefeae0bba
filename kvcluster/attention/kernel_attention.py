"""Attention over keys of one rank in kernels, where there is one that serves the call.

What no kernel serves is computed as `local` does. Only this module, `kernel_rows`,
`kernel_selected` and `packed_keys` know the kernels.

Shape letters: T query tokens, S keys, R rows of decode, H query heads, K KV heads, D head
dimension.
"""

from collections.abc import Collection
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from kvcluster_kernels import merge as merge_kernel
from kvcluster_kernels import prefill_gluon, prefill_tl
from kvcluster_kernels.column_sums import column_sums
from kvcluster_kernels.encode_blocks import Blocks
from kvcluster_kernels.packed_history import AnyHistory, prefill_history
from kvcluster_kernels.packed_prefill import History as PackedHistory
from kvcluster_kernels.packed_restore import restore
from kvcluster_kernels.prefill_arguments import (
    MAX_HEAD_DIM,
    BlockBound,
    Causal,
    Keys,
    PartialAttention,
)
from numpy.typing import NDArray
from torch import Tensor

from kvcluster.attention import local
from kvcluster.attention.history import History
from kvcluster.attention.implementation import SwitchingKeys
from kvcluster.attention.kernel_choice import Prefill, prefill_choice
from kvcluster.attention.kernel_encoding import EncodeBlocks, block_encoder
from kvcluster.attention.kernel_rows import KernelRows
from kvcluster.attention.kernel_selected import KernelSelected
from kvcluster.attention.latent_cache import LatentCache
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial
from kvcluster.attention.row_tables import exact_span
from kvcluster.cache.store import KVStore, Piece, keys_and_values
from kvcluster.types import EXACT, LayerGeometry

DTYPES: Final = (torch.bfloat16, torch.float16)
"""What matrix units multiply. Float32 is served, but not faster than by torch."""
_LEAST_DIM: Final = 16
"""Of values that only their weights are asked of: a matrix product is of 16 numbers at least."""
_PAGED_ROWS: Final = 4096
"""Rows of a chunk from which on its history is gathered first: kernels are a fortieth faster over
keys in one piece, and what gathering costs does not grow with the rows."""


class KernelAttention:
    """An `Implementation` over the cache of one rank."""

    def __init__(self, store: KVStore, dtypes: Collection[torch.dtype] = DTYPES) -> None:
        """`dtypes`: of the queries that go to kernels. On a CPU these run in Triton's
        interpreter."""
        self._store = store
        self._spec = store.spec
        self._dtypes = dtypes
        self._encoders: dict[tuple[int, str], tuple[EncodeBlocks, EncodeBlocks] | None] = {}
        self._page_ids: WeakKeyDictionary[SequencePart, dict[tuple[int, bool], Tensor]] = (
            WeakKeyDictionary()
        )
        self.rows: KernelRows | None = (
            KernelRows(store, self.merge) if store.planes(0).k_PKSD.dtype in dtypes else None
        )
        self.chosen: KernelSelected | None = (
            None if self.rows is None else KernelSelected(store, self.rows, self.merge, dtypes)
        )

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        layer: LayerGeometry,
        mask_TS: Tensor | None = None,
    ) -> Partial:
        if mask_TS is None and self._serves(q_THD, k_KSD, v_KSD, layer):
            return _prefill(q_THD, Keys.in_line(k_KSD, v_KSD), layer, None)
        return local.attend(q_THD, k_KSD, v_KSD, layer, mask_TS)

    def attend_causal(
        self, q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry, first: int
    ) -> Partial:
        last = first + q_THD.shape[0]
        if self._serves(q_THD, k_KSD[:, :last], v_KSD, layer):
            causal = Causal(first, window=layer.window)
            keys = Keys.in_line(k_KSD[:, :last], v_KSD[:, :last])
            return _prefill(q_THD, keys, layer, causal)
        return local.attend_causal(q_THD, k_KSD, v_KSD, layer, first)

    def attend_earlier(
        self, q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry, *, gap: int
    ) -> Partial:
        if self._serves(q_THD, k_KSD, v_KSD, layer):
            causal = None
            if layer.window is not None:
                causal = Causal(k_KSD.shape[1] + gap, window=layer.window)
            return _prefill(q_THD, Keys.in_line(k_KSD, v_KSD), layer, causal)
        return local.attend_earlier(q_THD, k_KSD, v_KSD, layer, gap=gap)

    def attend_pages(self, layer: int, part: SequencePart, q_THD: Tensor) -> Partial | None:
        geometry = self._spec.layers[layer]
        k_PKSD, v_PKSD = self._store.planes(layer)
        # Survivors are parts of another kind, and have other tables.
        if type(part) is not SequencePart or not self._serves(
            q_THD, k_PKSD[0], v_PKSD[0], geometry
        ):
            return None
        history = part.history(self._spec.group_of(geometry), geometry.window)
        if part.codec_in(geometry.window) != EXACT:
            return self._attend_packed(layer, part, history, q_THD)
        span = exact_span(history, self._store.block_size)
        if span.start or not span.end or q_THD.shape[0] >= _PAGED_ROWS:
            return None
        ids_N = self._ids(part, layer, span.blocks_B)
        keys = Keys(k_PKSD, v_PKSD, span.end, ids_N, self._store.block_size)
        return _prefill(q_THD, keys, geometry, None)

    def _attend_packed(
        self, layer: int, part: SequencePart, history: History, q_THD: Tensor
    ) -> Partial | None:
        """Over the exact blocks and the encoded ones."""
        geometry, held = self._spec.layers[layer], history.ranks[part.rank]
        packed = self.rows.packed(layer, part.codec) if self.rows is not None else None
        if packed is None or geometry.softcap is not None or held.num_skipped:
            return None
        ids_N = self._ids(part, layer, history.encoded_ids_B.numpy())
        blocks: AnyHistory | None
        if isinstance(packed, LatentCache):
            positions_N = self._ids(part, layer, held.starts_B.numpy(), are_positions=True)
            blocks = packed.history(ids_N, positions_N, geometry)
        else:
            blocks = packed.history(ids_N, self._store.block_size)
        if blocks is None or not held.num_blocks:
            return None
        carry = None
        if history.runs:
            exact = keys_and_values(self._store.gather(layer, history.runs).planes, geometry)
            carry = PartialAttention(*_prefill(q_THD, Keys.in_line(*exact), geometry, None))
        return Partial(*prefill_history(q_THD, blocks, scale=geometry.scale, carry=carry))

    def _ids(
        self,
        part: SequencePart,
        layer: int,
        blocks_B: NDArray[np.int64],
        *,
        are_positions: bool = False,
    ) -> Tensor:
        """Blocks of a chunk's history, or their positions, copied once for all layers of a KV
        group."""
        key = (self._spec.group_of(self._spec.layers[layer]), are_positions)
        known = self._page_ids.setdefault(part, {})
        if key not in known:
            ids_N = torch.from_numpy(blocks_B.astype(np.int32))
            known[key] = ids_N.to(self._store.device)
        return known[key]

    def attend_switching(
        self, q_THD: Tensor, keys: SwitchingKeys, layer: LayerGeometry, first: int
    ) -> Partial | None:
        last = first + q_THD.shape[0]
        near, read = (Piece(k[:, :last], v[:, :last]) for k, v in (keys.near, keys.read))
        if not (self._serves(q_THD, *near, layer) and self._serves(q_THD, *read, layer)):
            return None
        before = BlockBound(keys.block_size, keys.lag, is_before=True)
        causal = Causal(first, window=layer.window, bound=before)
        earlier = _prefill(q_THD, Keys.in_line(*read), layer, causal)
        causal = causal._replace(bound=before._replace(is_before=False))
        return _prefill(q_THD, Keys.in_line(*near), layer, causal, earlier)

    def attention_sums(
        self, q_THD: Tensor, k_KSD: Tensor, layer: LayerGeometry, first: int
    ) -> Tensor | None:
        """In float32, where the definition is exact: of tokens that got as much attention as each
        other to seven digits, another may stay than without kernels."""
        v_KSD = k_KSD[..., :_LEAST_DIM]
        if layer.window is not None or not self._serves(q_THD, k_KSD, v_KSD, layer):
            return None
        keys, causal = Keys.in_line(k_KSD, v_KSD), Causal(first)
        lse_TH = _prefill(q_THD, keys, layer, causal).lse_TH
        return column_sums(
            q_THD, keys, lse_TH, scale=layer.scale, causal=causal, softcap=layer.softcap
        )

    def merge(self, *partials: Partial) -> Partial:
        if len(partials) == 1:
            return partials[0]
        return Partial(*merge_kernel.merge([PartialAttention(*partial) for partial in partials]))

    def encodes(self, layer: int, codec: str) -> bool:
        """Whether `encode` is offered."""
        return self._encoders_of(layer, codec) is not None

    def encode(self, layer: int, codec: str, encoded_ids_B: Tensor, kv_BKSD: Piece) -> bool:
        encoders = self._encoders_of(layer, codec)
        if encoders is None:
            return False
        ids_B = encoded_ids_B.to(self._store.device, torch.int32)
        for encode, x_BKSD in zip(encoders, kv_BKSD, strict=True):
            encode(Blocks(x_BKSD, ids_B))
        return True

    def restored(self, layer: int, codec: str, encoded_ids_B: Tensor) -> Piece | None:
        packed = self.rows.packed(layer, codec) if self.rows is not None else None
        if packed is None or isinstance(packed, LatentCache):
            return None
        ids_N = encoded_ids_B.to(self._store.device, torch.int32)
        blocks = packed.history(ids_N, self._store.block_size)
        # Rotated vectors would come as they are stored.
        if not isinstance(blocks, PackedHistory):
            return None
        dtype = self._store.planes(layer).k_PKSD.dtype
        keys = restore(blocks, self._spec.layers[layer].key_dim, dtype)
        return Piece(keys.k_PKSD[0], keys.v_PKSD[0])

    def _encoders_of(self, layer: int, codec: str) -> tuple[EncodeBlocks, EncodeBlocks] | None:
        key = (layer, codec)
        if key not in self._encoders:
            self._encoders[key] = self._find_encoders(layer, codec)
        return self._encoders[key]

    def _find_encoders(self, layer: int, codec: str) -> tuple[EncodeBlocks, EncodeBlocks] | None:
        """Of keys and values; None where kernels do not write both."""
        geometry = self._spec.layers[layer]
        if geometry.values_in_keys or self._store.planes(layer).k_PKSD.dtype not in self._dtypes:
            return None
        keys, values = self._store.layer_codec(layer, codec)
        k_planes, v_planes = self._store.encoded_planes(layer, codec)
        encode_keys = block_encoder(keys, k_planes, self._store.block_size)
        encode_values = block_encoder(values, v_planes, geometry.value_dim)
        if encode_keys is None or encode_values is None:
            return None
        return encode_keys, encode_values

    def _serves(self, q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry) -> bool:
        return (
            q_THD.dtype in self._dtypes
            and k_KSD.dtype == v_KSD.dtype == q_THD.dtype
            and q_THD.shape[0] > 0
            and k_KSD.shape[1] > 0
            and max(layer.key_dim, layer.value_dim) <= MAX_HEAD_DIM
        )


def _prefill(
    q_THD: Tensor,
    keys: Keys,
    layer: LayerGeometry,
    causal: Causal | None,
    others: Partial | None = None,
) -> Partial:
    """By the kernel that is chosen for the call. `others`: of the same rows over other keys, which
    is merged."""
    carry = None if others is None else PartialAttention(*others)
    choice = prefill_choice(q_THD, keys, causal=causal, softcap=layer.softcap)
    if choice is Prefill.PIPELINED:
        found = prefill_gluon.prefill(q_THD, keys, scale=layer.scale, causal=causal, carry=carry)
    else:
        found = prefill_tl.prefill(
            q_THD, keys, scale=layer.scale, causal=causal, softcap=layer.softcap, carry=carry
        )
    return Partial(*found)
