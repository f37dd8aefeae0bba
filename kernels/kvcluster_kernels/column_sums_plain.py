"""The definition of `column_sums.column_sums` in plain PyTorch, on any device.

Shape letters: those of `column_sums.py`.
"""

import math

import torch
from torch import Tensor

from kvcluster_kernels.prefill_arguments import Causal, Keys, check_arguments
from kvcluster_kernels.prefill_reference import keys_in_line, visible


def column_sums(
    q_THD: Tensor,
    keys: Keys,
    lse_TH: Tensor,
    *,
    scale: float,
    causal: Causal | None = None,
    softcap: float | None = None,
    num_splits: int | None = None,  # noqa: ARG001
) -> Tensor:
    """As the kernel; computed in float64 where queries are, else in float32."""
    check_arguments(q_THD, keys, scale, causal, None)
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    k_KSD = keys_in_line(keys)[0].to(dtype)
    q_TKGD = q_THD.to(dtype).unflatten(1, (k_KSD.shape[0], -1))
    logits_KGTS = torch.einsum("tkgd,ksd->kgts", q_TKGD, k_KSD) * scale
    if softcap is not None:
        logits_KGTS = softcap * torch.tanh(logits_KGTS / softcap)
    if causal is not None:
        mask_TS = visible(causal, len(q_THD), keys.num_keys, q_THD.device)
        logits_KGTS = logits_KGTS.masked_fill(~mask_TS, -math.inf)
    lse_KGT = lse_TH.to(dtype).unflatten(1, (k_KSD.shape[0], -1)).permute(1, 2, 0)
    has_keys_KGT = lse_KGT > -math.inf
    shift_KGT = torch.where(has_keys_KGT, lse_KGT, 0.0)
    weights_KGTS = torch.exp(logits_KGTS - shift_KGT[..., None])
    return torch.where(has_keys_KGT[..., None], weights_KGTS, 0.0).sum(dim=(1, 2))
