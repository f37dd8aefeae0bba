"""Attention over chosen blocks: its definition, and decode over a list of blocks for each KV head.

Shape letters: those of `paging.py`; S keys, U tiles of queries, L blocks of a list.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster_kernels.decode import ExactPages
from kvcluster_kernels.paging import PagedRows
from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention
from kvcluster_kernels.prefill_reference import keys_in_line, visible
from kvcluster_kernels.sparse_prefill import TileBlocks, check_sparse


class HeadRows(NamedTuple):
    """A batch in which every KV head of a row is a row of one KV head, with blocks of its own."""

    q_RTHD: Tensor
    rows: PagedRows


def heads_as_rows(q_RTHD: Tensor, rows_of_heads: PagedRows, num_kv_heads: int) -> HeadRows:
    """`rows_of_heads` has a row for each KV head of each row, R * K of them, whose blocks are those
    of `one_head_pages` or `one_head_planes`. Results are R * K rows of H / K heads: `heads_back`.
    """
    num_rows, num_tokens, num_heads, dim = q_RTHD.shape
    shape = (num_rows, num_tokens, num_kv_heads, num_heads // num_kv_heads, dim)
    q_RKTGD = q_RTHD.reshape(shape).transpose(1, 2)
    return HeadRows(q_RKTGD.flatten(0, 1).contiguous(), rows_of_heads)


def heads_back(x: Tensor, num_kv_heads: int) -> Tensor:
    """Rows of one KV head each, `[R * K, T, H / K, ...]`, as rows of all heads."""
    by_row: Tensor = x.reshape(-1, num_kv_heads, *x.shape[1:])
    return by_row.transpose(1, 2).flatten(2, 3)


def one_head_pages(pages: ExactPages) -> ExactPages:
    """Exact pages in which the heads of a page lie one after another as blocks of one head: block
    b of head h is block `(b // n * K + h) * n + b % n`, n blocks to a page. A view."""

    def in_line(x_PKND: Tensor) -> Tensor:
        return x_PKND.view(x_PKND.shape[0], 1, -1, x_PKND.shape[3])

    return pages._replace(k_PKND=in_line(pages.k_PKND), v_PKND=in_line(pages.v_PKND))


def one_head_planes(plane: Tensor) -> Tensor:
    """The same of a plane of encoded pages `[pages, n, K, ...]`: block b of head h is block
    `b * K + h`. A view."""
    return plane.flatten(1, 2).unsqueeze(2)


def blocks_of_heads(blocks_RKB: Tensor, *, page_blocks: int, is_encoded: bool) -> Tensor:
    """Block tables for `heads_as_rows`, int32 [R * K, B]: the blocks that each KV head reads, by
    their ids in the cache."""
    heads_K1 = torch.arange(blocks_RKB.shape[1], device=blocks_RKB.device)[:, None]
    num_kv_heads = blocks_RKB.shape[1]
    if is_encoded:
        ids = blocks_RKB * num_kv_heads + heads_K1
    else:
        pages, places = blocks_RKB // page_blocks, blocks_RKB % page_blocks
        ids = (pages * num_kv_heads + heads_K1) * page_blocks + places
    return ids.flatten(0, 1).to(torch.int32).contiguous()


def sparse_prefill(
    q_THD: Tensor,
    keys: Keys,
    chosen: TileBlocks,
    *,
    scale: float,
    causal: Causal | None = None,
    softcap: float | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> PartialAttention:
    """The definition of `sparse_prefill.sparse_prefill`; in float64 where queries are."""
    check_sparse(q_THD, keys, chosen, scale, causal)
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    k_KSD, v_KSD = (x.to(dtype) for x in keys_in_line(keys))
    mask_HTS = chosen_keys(chosen, len(q_THD), keys.num_keys)
    if causal is not None:
        mask_HTS = mask_HTS & visible(causal, len(q_THD), keys.num_keys, q_THD.device)
    mask_HTS = mask_HTS.repeat_interleave(q_THD.shape[1] // len(mask_HTS), dim=0)
    mask_KGTS = mask_HTS.unflatten(0, (k_KSD.shape[0], -1))
    q_TKGD = q_THD.to(dtype).unflatten(1, (k_KSD.shape[0], -1))
    logits_KGTS = torch.einsum("tkgd,ksd->kgts", q_TKGD, k_KSD) * scale
    if softcap is not None:
        logits_KGTS = softcap * torch.tanh(logits_KGTS / softcap)
    logits_KGTS = logits_KGTS.masked_fill(~mask_KGTS, -math.inf)
    lse_KGT = torch.logsumexp(logits_KGTS, dim=-1)
    shift_KGT = torch.where(lse_KGT == -math.inf, 0.0, lse_KGT)
    weights_KGTS = torch.exp(logits_KGTS - shift_KGT[..., None])
    out_TKGD = torch.einsum("kgts,ksd->tkgd", weights_KGTS, v_KSD)
    return PartialAttention(
        out_TKGD.flatten(1, 2).to(dtype if dtype == torch.float64 else out_dtype),
        lse_KGT.permute(2, 0, 1).flatten(1, 2).contiguous(),
    )


def chosen_keys(chosen: TileBlocks, num_tokens: int, num_keys: int) -> Tensor:
    """mask_GTS: which keys the list of a row has."""
    num_heads, num_tiles, length = chosen.blocks_GUL.shape
    num_blocks = -(-num_keys // chosen.block_tokens)
    device = chosen.blocks_GUL.device
    is_listed_GUL = torch.arange(length, device=device) < chosen.counts_GU[..., None]
    # What lies behind a list's end goes to a block that there is not.
    numbers_GUL = torch.where(is_listed_GUL, chosen.blocks_GUL, num_blocks).long()
    is_chosen_GUB = torch.zeros(
        (num_heads, num_tiles, num_blocks + 1), dtype=torch.bool, device=device
    ).scatter_(2, numbers_GUL, True)[:, :, :num_blocks]  # noqa: FBT003
    mask_GUS = is_chosen_GUB.repeat_interleave(chosen.block_tokens, 2)[:, :, :num_keys]
    return mask_GUS.repeat_interleave(chosen.tile_tokens, 1)[:, :num_tokens]
