"""The definition of `chosen_blocks`. Shape letters: those there; L tokens of a row."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcluster_kernels.block_lists import blocks_of_heads
from kvcluster_kernels.chosen_blocks import (
    ALWAYS,
    ENCODED,
    EXACT,
    FREE,
    BlockLists,
    Candidates,
    Pools,
)
from kvcluster_kernels.paging import PagedRows


def pick(score_GJS: Tensor, candidates: Candidates) -> Tensor:
    """As `chosen_blocks.pick`."""
    flags_JB, num_J = candidates
    assert num_J is not None, "picks want numbers of blocks"
    num_blocks = flags_JB.shape[1]
    is_free_JB = flags_JB & FREE > 0
    is_free_JB[:, score_GJS.shape[2] :] = False
    score_GJB = pad(score_GJS, (0, num_blocks - score_GJS.shape[2]))
    score_GJB = score_GJB.masked_fill(~is_free_JB, -torch.inf)
    order_GJB = score_GJB.argsort(dim=-1, descending=True, stable=True)
    places_B = torch.arange(num_blocks, device=flags_JB.device)
    is_best_GJB = (places_B < num_J[:, None]).expand_as(order_GJB)
    picked_GJB = torch.zeros_like(is_best_GJB).scatter(-1, order_GJB, is_best_GJB)
    return picked_GJB & is_free_JB | (flags_JB & ALWAYS > 0)


def lists(reads_GJB: Tensor, flags_JB: Tensor, flag: int) -> BlockLists:
    """As `chosen_blocks.lists`; behind a list's end are the blocks that it does not have."""
    is_listed_GJB = reads_GJB & (flags_JB & flag > 0)
    blocks_GJB = (~is_listed_GJB).to(torch.uint8).argsort(dim=-1, stable=True)
    return BlockLists(blocks_GJB.int(), is_listed_GJB.sum(dim=-1).int())


def row_tables(
    worth_GJB: Tensor, candidates: Candidates, left_J: Tensor, pools: Pools
) -> tuple[PagedRows, PagedRows | None]:
    """As `chosen_blocks.row_tables`."""
    flags_JB = candidates.flags_JB
    reads_GJB = worth_GJB if candidates.num_J is None else pick(worth_GJB, candidates)
    exact_ids_B, encoded_ids_B, _, size, *_ = pools
    exact = _rows(lists(reads_GJB, flags_JB, EXACT), exact_ids_B, left_J, pools)
    if encoded_ids_B is None:
        return exact, None
    found = lists(reads_GJB, flags_JB, ENCODED)
    encoded = _rows(found, encoded_ids_B, torch.zeros_like(left_J), pools, is_encoded=True)
    positions_XB = found.blocks_GJB.transpose(0, 1).flatten(0, 1) * size
    return exact, encoded._replace(block_positions_RB=positions_XB.contiguous())


def _rows(
    found: BlockLists, ids_B: Tensor, left_J: Tensor, pools: Pools, *, is_encoded: bool = False
) -> PagedRows:
    numbers_JGB = found.blocks_GJB.transpose(0, 1).long()
    num_queries, num_choosing, num_blocks = numbers_JGB.shape
    ids_JGB = ids_B.expand(num_queries, num_blocks)[:, None].expand(-1, num_choosing, -1)
    ids_JGB = ids_JGB.gather(2, numbers_JGB)
    num_kv_heads = pools.encoded_heads if is_encoded else pools.exact_heads
    if num_kv_heads > 1:
        # Heads that choose are KV heads, or query heads of which several share one.
        sharing = ids_JGB.shape[1] // num_kv_heads
        by_place = [
            blocks_of_heads(
                ids_JGB[:, place::sharing], page_blocks=pools.page_blocks, is_encoded=is_encoded
            )
            for place in range(sharing)
        ]
        ids_JGB = torch.stack(by_place, dim=1).view(*ids_JGB.shape)
    ends_JG = found.counts_GJ.T * pools.block_size - left_J[:, None]
    ends_X = ends_JG.clamp_min(0).flatten().int()
    return PagedRows(
        ids_JGB.flatten(0, 1).int().contiguous(), torch.zeros_like(ends_X), ends_X.contiguous()
    )
