"""Attention of one query row over encoded blocks, as they are stored, a few at a time.

The definition decodes all keys and values and attends to them (`KVStore.decode`, `attend_plain`).
Here blocks are read in their inner form (`codec/inner.py`), a tile at a time, so that what is
unpacked stays in the processor's cache and no history is ever held at full size. Values that are
latents are summed as latents, and the sum is expanded once.

Shape letters: H query heads, K KV heads, G query heads of a KV head, J heads as
stored, S keys, C and D inner and head dimensions, B blocks.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvcluster.attention.partial import Partial, merge
from kvcluster.cache.store import KVStore, in_line
from kvcluster.codec.inner import Decoded, inner_keys, inner_values
from kvcluster.types import LayerGeometry

_TILE_TOKENS: Final = 2048
"""Keys unpacked at a time: 4 MiB of keys and values at 3 heads of 64. With fewer, the calls cost
more than the cache saves."""


class EncodedKeys(NamedTuple):
    """Encoded blocks of one layer on this rank."""

    codec: str
    ids_B: Tensor
    positions_BS: Tensor
    """Of each block's tokens, int64."""
    num_skipped: int
    """Tokens of the first block that are not read."""


def attend_encoded(
    q_1HD: Tensor,
    store: KVStore,
    layer: int,
    keys: EncodedKeys,
    geometry: LayerGeometry,
    *,
    tile_tokens: int = _TILE_TOKENS,
) -> Partial:
    """One row over all tokens of the blocks but the skipped ones. No blocks: `Partial.empty`."""
    if not len(keys.ids_B):
        return Partial.empty(1, geometry.num_query_heads, geometry.value_dim, q_1HD)
    codec = store.layer_codec(layer, keys.codec)
    k_codec, v_codec = inner_keys(codec.keys), inner_values(codec.values)
    if geometry.values_in_keys:
        # Values are cut out of keys, which is not to be done in another basis.
        k_codec = v_codec = Decoded(codec.keys)
    q_HC = k_codec.fold(q_1HD)[0]
    q_KGC = q_HC.reshape(geometry.num_kv_heads, -1, q_HC.shape[1])
    num_tile = max(1, tile_tokens // store.block_size)
    skipped = keys.num_skipped
    partials = []
    for ids_B, positions_BS in zip(
        *(torch.split(x_B, num_tile) for x_B in (keys.ids_B, keys.positions_BS)), strict=True
    ):
        k_planes, v_planes = store.read_arrays(layer, keys.codec, ids_B)
        k_JSC = in_line(k_codec.inner(k_planes, positions_BS))[:, skipped:]
        if geometry.values_in_keys:
            v_JSC = k_JSC[..., : geometry.value_dim]
        else:
            v_JSC = in_line(v_codec.inner(v_planes, positions_BS))[:, skipped:]
        partials.append(_attend_tile(q_KGC, k_JSC, v_JSC, geometry))
        skipped = 0
    out_1HC, lse_1H = merge(*partials)
    return Partial(v_codec.expand(out_1HC), lse_1H)


def _attend_tile(q_KGC: Tensor, k_KSC: Tensor, v_JSC: Tensor, geometry: LayerGeometry) -> Partial:
    """Two matrix products: fused kernels want values as wide as keys, and heads of their own."""
    logits_KGS = (q_KGC * geometry.scale) @ k_KSC.transpose(1, 2)
    if geometry.softcap is not None:
        logits_KGS = geometry.softcap * torch.tanh(logits_KGS / geometry.softcap)
    lse_KG = torch.logsumexp(logits_KGS, dim=-1)
    weights_KGS = torch.exp(logits_KGS - lse_KG[..., None])
    if len(v_JSC) == 1:
        weights_KGS = weights_KGS.flatten(0, 1)[None]
    out_JGC = weights_KGS @ v_JSC
    return Partial(out_JGC.reshape(1, -1, v_JSC.shape[-1]), lse_KG.reshape(1, -1))
