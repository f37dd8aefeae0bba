"""The definition of prefill attention in plain PyTorch: the twin of every prefill kernel.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension.
"""

import math

import torch
from torch import Tensor

from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention, check_arguments


def prefill(
    q_THD: Tensor,
    keys: Keys,
    *,
    scale: float,
    causal: Causal | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    carry: PartialAttention | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> PartialAttention:
    """softmax(softcap(scale * q k^T)) v with its LSE, merged with `carry`.

    `causal`: which keys a row sees; None: all. `softcap`: logits become
    softcap * tanh(logits / softcap). `sinks_H`: one more logit a head, whose value is zero.
    `carry`: float32 attention of the same rows over other keys. Arithmetic is in float32, or in
    float64 for queries of float64. Any T and S, zero included.

    Raises: ValueError when shapes do not fit.
    """
    check_arguments(q_THD, keys, scale, causal, carry)
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    num_tokens, num_heads, _ = q_THD.shape
    k_KSD, v_KSD = (x_KSD.to(dtype) for x_KSD in keys_in_line(keys))
    group = num_heads // k_KSD.shape[0]
    q_HTD = q_THD.to(dtype).transpose(0, 1)
    logits_HTS = q_HTD @ k_KSD.repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap is not None:
        logits_HTS = softcap * torch.tanh(logits_HTS / softcap)
    if causal is not None:
        mask_TS = visible(causal, num_tokens, keys.num_keys, q_THD.device)
        logits_HTS = logits_HTS.masked_fill(~mask_TS, -math.inf)
    lse_TH = torch.logsumexp(logits_HTS, dim=-1).transpose(0, 1)
    shift_HT = torch.where(lse_TH == -math.inf, 0.0, lse_TH).transpose(0, 1)
    weights_HTS = torch.exp(logits_HTS - shift_HT[..., None])
    out_THD = (weights_HTS @ v_KSD.repeat_interleave(group, 0)).transpose(0, 1)
    if carry is not None:
        out_THD, lse_TH = _merged(out_THD, lse_TH, carry.out_THD.to(dtype), carry.lse_TH.to(dtype))
    if sinks_H is not None:
        sinks_TH = sinks_H.to(dtype).expand_as(lse_TH)
        out_THD, lse_TH = _merged(out_THD, lse_TH, torch.zeros_like(out_THD), sinks_TH)
    out_dtype = dtype if dtype == torch.float64 else out_dtype
    return PartialAttention(out_THD.to(out_dtype).contiguous(), lse_TH.contiguous())


def keys_in_line(keys: Keys) -> tuple[Tensor, Tensor]:
    """k_KSD and v_KSD of the sequence, in order."""
    k_KSD, v_KSD = (_in_line(plane, keys) for plane in (keys.k_PKSD, keys.v_PKSD))
    return k_KSD, v_KSD


def visible(causal: Causal, num_tokens: int, num_keys: int, device: torch.device) -> Tensor:
    """mask_TS: True where the row sees the key."""
    keys_S = torch.arange(num_keys, device=device)
    positions_T = causal.positions(num_tokens, device)
    distance_TS = positions_T[:, None] - keys_S[None, :]
    mask_TS: Tensor = distance_TS >= 0
    if causal.window is not None:
        mask_TS &= distance_TS < causal.window
    if causal.bound is not None:
        is_before_TS = keys_S[None, :] < causal.bound.places(positions_T)[:, None]
        mask_TS &= is_before_TS if causal.bound.is_before else ~is_before_TS
    return mask_TS


def _in_line(x_PKSD: Tensor, keys: Keys) -> Tensor:
    if keys.block_ids_N is None:
        return x_PKSD[0, :, : keys.num_keys]
    blocks = keys.blocks_per_page
    ids_N = keys.block_ids_N.long()
    x_PKbsD = x_PKSD.reshape(*x_PKSD.shape[:2], blocks, keys.block_tokens, -1)
    x_NKsD = x_PKbsD[ids_N // blocks, :, ids_N % blocks]
    return x_NKsD.transpose(0, 1).flatten(1, 2)[:, : keys.num_keys]


def _merged(
    out_THD: Tensor, lse_TH: Tensor, other_THD: Tensor, other_TH: Tensor
) -> tuple[Tensor, Tensor]:
    lowest = torch.finfo(lse_TH.dtype).min
    share_TH = torch.sigmoid(other_TH - lse_TH.clamp_min(lowest))
    return torch.lerp(out_THD, other_THD, share_TH[..., None]), torch.logaddexp(lse_TH, other_TH)
