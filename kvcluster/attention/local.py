"""Attention of some queries over keys that lie on this rank: one shard, one `Partial`.

`attend_plain` is the definition; `attend` picks torch's fused kernels where they compute the same.
Keys come head-major, as the store keeps them.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension, X rows of the
query heads that share a KV head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcluster.attention.partial import Partial, merge
from kvcluster.cache.store import Piece, in_line
from kvcluster.types import LayerGeometry

_PLAIN_TILE_ELEMENTS = 1 << 24
"""Logits that the plain definition holds at one time: 64 MiB of float32."""
_SLICE_ROWS = 32
"""Rows of a head that torch's kernel gives to one thread at a time, where there are few."""


def visible(q_positions_T: Tensor, k_positions_S: Tensor, window: int | None) -> Tensor:
    """mask_TS: True where the query may read the key, by causality and the model's window."""
    distance_TS = q_positions_T[:, None] - k_positions_S[None, :]
    mask_TS = distance_TS >= 0
    if window is not None:
        mask_TS &= distance_TS < window
    return mask_TS


def visible_blocks(q_blocks_T: Tensor, k_blocks_S: Tensor, recent_blocks: int) -> Tensor:
    """mask_TS: True where the query's block may read the key's earlier one: the first block, and
    the `recent_blocks` latest ones, its own included."""
    distance_TS = q_blocks_T[:, None] - k_blocks_S[None, :]
    return (distance_TS < recent_blocks) | (k_blocks_S == 0)[None, :]


def attend(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    layer: LayerGeometry,
    mask_TS: Tensor | None = None,
) -> Partial:
    """Attention over all keys, or over those that `mask_TS` shows. Any T and S, zero included."""
    num_tokens, num_heads, _ = q_THD.shape
    if num_tokens == 0 or k_KSD.shape[1] == 0:
        return Partial.empty(num_tokens, num_heads, layer.value_dim, q_THD)
    if not _has_fused_kernel(q_THD, layer):
        return attend_plain(q_THD, k_KSD, v_KSD, layer, mask_TS)
    bias_TS = None
    if mask_TS is not None:
        bias_TS = torch.zeros(mask_TS.shape, dtype=q_THD.dtype).masked_fill_(~mask_TS, -math.inf)
    partial = _fused(q_THD, k_KSD, v_KSD, layer, bias_TS=bias_TS, is_causal=False)
    if mask_TS is None:
        return partial
    # The kernel reports LSE 0, not -inf, for a row that saw no key.
    blind_T = ~mask_TS.any(dim=1)
    return Partial(
        partial.out_THD.masked_fill(blind_T[:, None, None], 0.0),
        partial.lse_TH.masked_fill(blind_T[:, None], -math.inf),
    )


def attend_pieces(q_THD: Tensor, pieces: Sequence[Piece], layer: LayerGeometry) -> Partial:
    """Attention over all keys of some pieces of a store. Any T and S, zero included."""
    num_tokens, num_heads, _ = q_THD.shape
    if not pieces:
        return Partial.empty(num_tokens, num_heads, layer.value_dim, q_THD)
    num_pages = sum(len(piece.k_PKSD) for piece in pieces)
    if num_tokens == 1 and num_pages > 1 and _has_fused_kernel(q_THD, layer):
        return _attend_pages(q_THD, pieces, layer)
    return merge(
        *(attend(q_THD, in_line(piece.k_PKSD), in_line(piece.v_PKSD), layer) for piece in pieces)
    )


def attend_causal(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry, first: int
) -> Partial:
    """Attention inside one prefill chunk: query row t is key `first + t` and sees no later one.

    `first + T <= S`. A window narrower than the chunk is walked in tiles, so that the work grows
    with T * window and not with T * S.
    """
    num_tokens = q_THD.shape[0]
    if num_tokens == 0:
        return Partial.empty(0, q_THD.shape[1], layer.value_dim, q_THD)
    last = first + num_tokens
    if layer.window is not None and layer.window < last:
        return _attend_windowed(q_THD, k_KSD, v_KSD, layer, first)
    own = _attend_square(q_THD, k_KSD[:, first:last], v_KSD[:, first:last], layer)
    if first == 0:
        return own
    return merge(attend(q_THD, k_KSD[:, :first], v_KSD[:, :first], layer), own)


def attend_earlier(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry, *, gap: int
) -> Partial:
    """Attention of consecutive tokens over S consecutive keys that end `gap` tokens before them."""
    num_tokens, num_keys = q_THD.shape[0], k_KSD.shape[1]
    if layer.window is None:
        return attend(q_THD, k_KSD, v_KSD, layer)
    first = num_keys + gap
    low = min(num_keys, max(0, first - layer.window + 1))
    mask_TS = visible(
        torch.arange(first, first + num_tokens, device=q_THD.device),
        torch.arange(low, num_keys, device=q_THD.device),
        layer.window,
    )
    return attend(q_THD, k_KSD[:, low:], v_KSD[:, low:], layer, mask_TS)


def attend_plain(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    layer: LayerGeometry,
    mask_TS: Tensor | None = None,
) -> Partial:
    """The definition: softmax(softcap(scale * q k^T)) v with its LSE, in float32, any device."""
    num_tokens, num_heads, _ = q_THD.shape
    k_KSD, v_KSD = k_KSD.float(), v_KSD.float()
    num_kv_heads, num_keys, _ = k_KSD.shape
    tile = max(1, _PLAIN_TILE_ELEMENTS // max(1, num_heads * num_keys))
    tiles = []
    for start in range(0, num_tokens, tile):
        end = min(start + tile, num_tokens)
        # The query heads that share a KV head are rows of one product: its keys are not copied.
        num_rows = (end - start) * num_heads // num_kv_heads
        q_HTD = q_THD[start:end].float().transpose(0, 1)
        q_KXD = q_HTD.reshape(num_kv_heads, num_rows, layer.key_dim)
        logits_KXS = q_KXD @ k_KSD.transpose(1, 2) * layer.scale
        logits_HTS = logits_KXS.view(num_heads, end - start, num_keys)
        if layer.softcap is not None:
            logits_HTS = layer.softcap * torch.tanh(logits_HTS / layer.softcap)
        if mask_TS is not None:
            logits_HTS = logits_HTS.masked_fill(~mask_TS[start:end], -math.inf)
        lse_HT = torch.logsumexp(logits_HTS, dim=-1)
        shift_HT = torch.where(lse_HT == -math.inf, 0.0, lse_HT)
        weights_HTS = torch.exp(logits_HTS - shift_HT[..., None])
        out_KXD = weights_HTS.view(num_kv_heads, num_rows, num_keys) @ v_KSD
        out_HTD = out_KXD.view(num_heads, end - start, layer.value_dim)
        tiles.append(Partial(out_HTD.transpose(0, 1), lse_HT.transpose(0, 1)))
    return Partial(
        torch.cat([tile.out_THD for tile in tiles]), torch.cat([tile.lse_TH for tile in tiles])
    )


def _has_fused_kernel(q_THD: Tensor, layer: LayerGeometry) -> bool:
    """Only the CPU kernel gives float32 partials and an LSE for every mask we need."""
    return (
        q_THD.device.type == "cpu"
        and q_THD.dtype == torch.float32
        and layer.softcap is None
        and (layer.key_dim == layer.value_dim or layer.values_in_keys)
    )


def _fused(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    layer: LayerGeometry,
    *,
    bias_TS: Tensor | None,
    is_causal: bool,
) -> Partial:
    # Private to aten, but the only CPU attention that returns its LSE. It reads grouped KV heads
    # and strided slots as they are, and divides by zero when T or S is 0.
    num_tokens, num_heads, _ = q_THD.shape
    num_kv_heads = k_KSD.shape[0]
    q_HTD = q_THD.transpose(0, 1)
    num_slices = num_kv_heads * -(-num_heads // num_kv_heads // _SLICE_ROWS)
    is_packed = num_tokens == 1 and bias_TS is None and num_slices >= torch.get_num_threads()
    if is_packed:
        # The query heads that share a KV head become the rows of one head, so that its keys are
        # read once. The kernel gives each thread whole slices of a head, hence the condition.
        q_HTD = q_THD.reshape(num_kv_heads, num_heads // num_kv_heads, layer.key_dim)
    out_1HTD, lse_1HT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_HTD[None],
        k_KSD[None],
        _as_wide_as_keys(k_KSD, v_KSD, layer)[None],
        0.0,
        is_causal and not is_packed,
        attn_mask=bias_TS,
        scale=layer.scale,
    )
    out_1HTD = out_1HTD[..., : layer.value_dim]
    if is_packed:
        return Partial(out_1HTD.reshape(1, num_heads, -1), lse_1HT.reshape(1, num_heads))
    return Partial(out_1HTD[0].transpose(0, 1), lse_1HT[0].transpose(0, 1))


def _attend_pages(q_1HD: Tensor, pieces: Sequence[Piece], layer: LayerGeometry) -> Partial:
    """Attention of one token, without a copy of its keys: one partial a page, merged in one go."""
    q_KGD = q_1HD.reshape(pieces[0].k_PKSD.shape[1], -1, layer.key_dim)
    partials = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_KGD.expand(len(k_PKSD), -1, -1, -1),
            k_PKSD,
            _as_wide_as_keys(k_PKSD, v_PKSD, layer),
            0.0,
            scale=layer.scale,
        )
        for k_PKSD, v_PKSD in pieces
    ]
    out_PKGD, lse_PKG = (torch.cat(planes) for planes in zip(*partials, strict=True))
    out_PKGD = out_PKGD[..., : layer.value_dim]
    share_PKG = torch.softmax(lse_PKG, dim=0)
    out_KGD = (share_PKG[..., None] * out_PKGD).sum(dim=0)
    lse_KG = torch.logsumexp(lse_PKG, dim=0)
    return Partial(out_KGD.reshape(1, -1, layer.value_dim), lse_KG.reshape(1, -1))


def _as_wide_as_keys(k: Tensor, v: Tensor, layer: LayerGeometry) -> Tensor:
    """Values that the kernel takes, which wants them as wide as keys. Where they are the keys'
    first numbers, the keys: what they give beyond the values' width is cut off."""
    return k if layer.values_in_keys else v


def _attend_square(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry) -> Partial:
    """Causal attention where query row t is key t."""
    if q_THD.shape[0] == 1:
        return attend(q_THD, k_KSD, v_KSD, layer)
    if _has_fused_kernel(q_THD, layer):
        return _fused(q_THD, k_KSD, v_KSD, layer, bias_TS=None, is_causal=True)
    positions_T = torch.arange(q_THD.shape[0], device=q_THD.device)
    return attend_plain(q_THD, k_KSD, v_KSD, layer, visible(positions_T, positions_T, None))


def _attend_windowed(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry, first: int
) -> Partial:
    assert layer.window is not None
    tile = max(layer.window, 128)
    tiles = []
    for start in range(0, q_THD.shape[0], tile):
        q_tile = q_THD[start : start + tile]
        last = first + start + q_tile.shape[0]
        low = max(0, first + start - layer.window + 1)
        mask_TS = visible(
            torch.arange(first + start, last, device=q_THD.device),
            torch.arange(low, last, device=q_THD.device),
            layer.window,
        )
        tiles.append(attend(q_tile, k_KSD[:, low:last], v_KSD[:, low:last], layer, mask_TS))
    return Partial(
        torch.cat([tile.out_THD for tile in tiles]), torch.cat([tile.lse_TH for tile in tiles])
    )
