"""Decode over an exact paged cache in PyTorch: the definition of `decode.decode`, on any device.

`attend_tokens` is its core, which the definitions of packed decode share.

Shape letters: those of `paging.py`; S tokens of a row in line, G query heads of a KV head.
"""

import math

import torch
from torch import Tensor

from kvcluster_kernels.decode import ExactPages
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial


def decode(
    q_RTHD: Tensor,
    pages: ExactPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,  # noqa: ARG001
) -> Partial:
    """As the kernel; computed in float64 where queries are, else in float32."""
    k_PKND, v_PKND, block_size = pages
    num_blocks = k_PKND.shape[2] // block_size
    ids_RB = rows.blocks_RB.long()

    def in_line(x_PKND: Tensor) -> Tensor:
        in_blocks = x_PKND.reshape(*x_PKND.shape[:2], num_blocks, block_size, x_PKND.shape[3])
        x_RBKSD = in_blocks[ids_RB // num_blocks, :, ids_RB % num_blocks]
        return x_RBKSD.transpose(1, 2).flatten(2, 3)

    return attend_tokens(q_RTHD, in_line(k_PKND), in_line(v_PKND), rows, attention)


def attend_tokens(
    q_RTHD: Tensor, k_RKSD: Tensor, v_RKSD: Tensor, rows: PagedRows, attention: Attention
) -> Partial:
    """Attention over the tokens of each row's blocks, gathered and in line."""
    dtype = torch.promote_types(q_RTHD.dtype, torch.float32)
    mask_RTS = visible_tokens(rows, attention, q_RTHD.shape[1], k_RKSD.shape[2])
    seen_RS = mask_RTS.any(dim=1)[:, None, :, None]
    # What is not read may be anything, NaN included.
    k_RKSD, v_RKSD = (torch.where(seen_RS, x, 0).to(dtype) for x in (k_RKSD, v_RKSD))
    # Query heads in groups, one for each KV head: the cache is not copied for every head.
    q_RTKGD = q_RTHD.to(dtype).unflatten(2, (k_RKSD.shape[1], -1))
    scores_RKGTS = torch.einsum("rtkgd,rksd->rkgts", q_RTKGD, k_RKSD) * attention.scale
    if attention.softcap is not None:
        scores_RKGTS = attention.softcap * torch.tanh(scores_RKGTS / attention.softcap)
    scores_RKGTS = scores_RKGTS.masked_fill(~mask_RTS[:, None, None], -math.inf)
    lse_RKGT = torch.logsumexp(scores_RKGTS, dim=-1)
    shift_RKGT = torch.where(lse_RKGT == -math.inf, 0.0, lse_RKGT)
    weights_RKGTS = torch.exp(scores_RKGTS - shift_RKGT[..., None])
    out_RTKGD = torch.einsum("rkgts,rksd->rtkgd", weights_RKGTS, v_RKSD)
    return Partial(out_RTKGD.flatten(2, 3), lse_RKGT.flatten(1, 2).transpose(1, 2))


def visible_tokens(rows: PagedRows, attention: Attention, num_tokens: int, num_keys: int) -> Tensor:
    """mask_RTS: which tokens of its row a query token sees."""
    device = rows.blocks_RB.device
    places_S = torch.arange(num_keys, device=device)
    mask_RS = (places_S >= rows.starts_R[:, None]) & (places_S < rows.ends_R[:, None])
    mask_RTS = mask_RS[:, None].expand(-1, num_tokens, -1)
    if rows.block_positions_RB is None or rows.q_positions_RT is None:
        return mask_RTS
    block_size = num_keys // rows.blocks_RB.shape[1]
    offsets_S = torch.arange(block_size, device=device)
    positions_RS = (rows.block_positions_RB[..., None] + offsets_S).flatten(1)
    distance_RTS = rows.q_positions_RT[..., None] - positions_RS[:, None]
    mask_RTS = mask_RTS & (distance_RTS >= 0)
    if attention.window is not None:
        mask_RTS = mask_RTS & (distance_RTS < attention.window)
    return mask_RTS
