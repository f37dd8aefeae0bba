"""Attention of one sequence, written as its definition. The probe compares models with it, tests
compare the sharded attention with it.

Shapes: T query tokens, S keys so far, H query heads, K KV heads, D head dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcluster.types import LayerGeometry


class ReferenceAttention:
    """A `LayerAttention` that keeps every layer's K and V in memory, for a single sequence.

    Call `begin` before each forward pass.
    """

    def __init__(self, layers: Sequence[LayerGeometry]) -> None:
        self.layers = layers
        """May still grow while the first pass runs: the probe appends to it."""
        self._positions_T = torch.empty(0, dtype=torch.int64)
        self._positions_S: dict[int, Tensor] = {}
        self._keys_SKD: dict[int, Tensor] = {}
        self._values_SKD: dict[int, Tensor] = {}

    def begin(self, positions_T: Tensor) -> None:
        """Say which positions the tokens of the next pass have. Each position comes once."""
        self._positions_T = positions_T

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """See `LayerAttention`."""
        geometry = self.layers[layer]
        source = layer if geometry.kv_layer is None else geometry.kv_layer
        if source == layer:
            _extend(self._positions_S, layer, self._positions_T)
            _extend(self._keys_SKD, layer, k_TKD)
            _extend(self._values_SKD, layer, v_TKD)
        visible_TS = _visible(self._positions_T, self._positions_S[source], geometry.window)
        return attend_plainly(
            geometry,
            q_THD,
            self._keys_SKD[source],
            self._values_SKD[source],
            visible_TS,
            sinks_H,
        )


def attend_plainly(
    geometry: LayerGeometry,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    visible_TS: Tensor,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention over the visible keys, in float32; every query must see at least one."""
    queries_per_kv_head = geometry.num_query_heads // geometry.num_kv_heads
    k_SHD = k_SKD.float().repeat_interleave(queries_per_kv_head, dim=1)
    v_SHD = v_SKD.float().repeat_interleave(queries_per_kv_head, dim=1)
    logits_THS = torch.einsum("thd,shd->ths", q_THD.float(), k_SHD) * geometry.scale
    if geometry.softcap is not None:
        logits_THS = geometry.softcap * torch.tanh(logits_THS / geometry.softcap)
    logits_THS = logits_THS.masked_fill(~visible_TS[:, None, :], -math.inf)
    lse_TH = logits_THS.logsumexp(dim=-1)
    if sinks_H is not None:
        lse_TH = torch.logaddexp(lse_TH, sinks_H.float())
    weights_THS = torch.exp(logits_THS - lse_TH[..., None])
    return torch.einsum("ths,shd->thd", weights_THS, v_SHD).to(q_THD.dtype)


def _visible(positions_T: Tensor, positions_S: Tensor, window: int | None) -> Tensor:
    distance_TS = positions_T[:, None] - positions_S[None, :]
    visible_TS = distance_TS >= 0
    return visible_TS if window is None else visible_TS & (distance_TS < window)


def _extend(by_layer: dict[int, Tensor], layer: int, rows: Tensor) -> None:
    held = by_layer.get(layer)
    # A copy: the model may reuse the memory of what it passed.
    by_layer[layer] = rows.clone() if held is None else torch.cat((held, rows))
