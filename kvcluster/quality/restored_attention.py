"""Attention that reads restored blocks of another pass, with a gradient: what distillation trains.

`kvcluster.quality.strict` says which blocks a query reads exactly; here those are the pass's own,
and all others are given: restored from what the exact model computed, layer by layer beforehand.
So a pass needs nothing of later layers, also where several share a latent. What that leaves out is
that the stored keys and values themselves are computed from restored ones.

Shape letters: T tokens of the sequence or of a tile, S keys, H query heads, K KV heads, D head
dimension.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcluster.attention.local import attend_plain, visible
from kvcluster.attention.partial import merge_sinks
from kvcluster.quality.strict import ExactTokens, KeysValues
from kvcluster.types import LayerGeometry, ModelSpec

_TILE_TOKENS: Final = 512
"""Queries that attend at one time: what is after a tile costs it nothing."""


class RestoredAttention:
    """A `LayerAttention` for one forward pass over one sequence, positions 0 to T - 1 in order,
    T at least `ExactTokens.block_size`. Differentiable in queries, keys, values and in what is
    restored, but for learned sinks."""

    def __init__(
        self, spec: ModelSpec, restored: Mapping[int, KeysValues], exact: ExactTokens
    ) -> None:
        """`restored`, by layer that stores K and V: the blocks after the first, as many as some
        query reads encoded. A layer that is not there is read exactly."""
        self._spec = spec
        self._restored = restored
        self._exact = exact
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """See `LayerAttention`."""
        geometry = self._spec.layers[layer]
        written = KeysValues(k_TKD.transpose(0, 1), v_TKD.transpose(0, 1))
        restored = self._restored.get(self._spec.kv_layer_of(layer))
        read = written if restored is None else self._read(written, restored)
        tile = max(1, _TILE_TOKENS // self._exact.block_size) * self._exact.block_size
        tiles = [
            self._tile(q_THD[first : first + tile], first, written, read, geometry, sinks_H)
            for first in range(0, len(q_THD), tile)
        ]
        return torch.cat(tiles).to(q_THD.dtype)

    def _read(self, written: KeysValues, restored: KeysValues) -> KeysValues:
        size = self._exact.block_size
        start = size if self._exact.exact_sinks else 0
        return KeysValues(
            *(
                torch.cat((own[:, :start], far, own[:, start + far.shape[1] :]), dim=1)
                for own, far in zip(written, restored, strict=True)
            )
        )

    def _tile(
        self,
        q_THD: Tensor,
        first: int,
        written: KeysValues,
        read: KeysValues,
        geometry: LayerGeometry,
        sinks_H: Tensor | None,
    ) -> Tensor:
        """Far keys in one form and near ones in both, under a mask that shows one of the two."""
        last = first + len(q_THD)
        low, near = self._bounds(first, geometry.window)
        mask_TS = self._mask(first, last, geometry.window, q_THD.device)
        k_KSD, v_KSD = read.rows(low, last).followed_by(written.rows(near, last))
        if sinks_H is None and geometry.softcap is None:
            num_sharing = geometry.num_query_heads // geometry.num_kv_heads
            out_1HTD = scaled_dot_product_attention(
                q_THD.transpose(0, 1)[None].float(),
                k_KSD.float().repeat_interleave(num_sharing, dim=0)[None],
                v_KSD.float().repeat_interleave(num_sharing, dim=0)[None],
                attn_mask=mask_TS,
                scale=geometry.scale,
            )
            return out_1HTD[0].transpose(0, 1)
        partial = attend_plain(q_THD, k_KSD, v_KSD, geometry, mask_TS)
        return (partial if sinks_H is None else merge_sinks(partial, sinks_H)).out_THD

    def _bounds(self, first: int, window: int | None) -> tuple[int, int]:
        """The first key that a tile reads, and the first that some query of it reads exactly."""
        low = 0 if window is None else max(0, first - window + 1)
        return low, max(low, first - self._exact.lag * self._exact.block_size)

    def _mask(self, first: int, last: int, window: int | None, device: torch.device) -> Tensor:
        if (first, window) not in self._masks:
            low, near = self._bounds(first, window)
            positions_T = torch.arange(first, last, device=device)
            positions_S = torch.arange(low, last, device=device)
            blocks_T, blocks_S = (x // self._exact.block_size for x in (positions_T, positions_S))
            seen_TS = visible(positions_T, positions_S, window)
            is_near_TS = blocks_S[None] >= (blocks_T - self._exact.lag)[:, None]
            self._masks[first, window] = torch.cat(
                (seen_TS & ~is_near_TS, (seen_TS & is_near_TS)[:, near - low :]), dim=1
            )
        return self._masks[first, window]
