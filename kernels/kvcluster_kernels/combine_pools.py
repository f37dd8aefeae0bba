"""Merges what the splits of rows found in several pools, into the answer that goes on.

As `combine` for each pool and `merge` of all, in one kernel that rounds once. `combine_pools_plain`
is the definition.

Shape letters: those of `paging.py`; S splits read together.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.combine import combine_plain, splits_at_once
from kvcluster_kernels.merge import merge_reference
from kvcluster_kernels.paging import SplitPartials, overlaps
from kvcluster_kernels.prefill_arguments import PartialAttention

_LOG2_E = tl.constexpr(math.log2(math.e))
_CHANNELS = 32
"""Of a program, as `combine` has it."""


def combine_pools(
    pools: Sequence[SplitPartials],
    *,
    num_tokens: int,
    out_dtype: torch.dtype,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """out_RTHD over the keys of all pools, of which there is one at least; zero where a query token
    saw no key. `sinks_H`: one more logit a head, whose value is zero.

    Raises: ValueError for pools of different rows.
    """
    num_rows, num_kv_heads, _, num_query_rows, dim = pools[0].out_RKXMD.shape
    shapes = {(*pool.out_RKXMD.shape[:2], *pool.out_RKXMD.shape[3:]) for pool in pools}
    if len(shapes) != 1:
        raise ValueError(f"combine_pools: pools of different rows, {sorted(shapes)}")
    device = pools[0].out_RKXMD.device
    num_heads = num_kv_heads * num_query_rows // num_tokens
    out_RTHD = torch.empty((num_rows, num_tokens, num_heads, dim), dtype=out_dtype, device=device)
    early = overlaps(device)
    chunks = triton.cdiv(dim, _CHANNELS)
    most = max(pool.out_RKXMD.shape[2] for pool in pools)
    _combine_pools_kernel[(num_query_rows * chunks, num_kv_heads, num_rows)](
        tuple(pool.out_RKXMD for pool in pools),
        tuple(pool.lse_RKXM for pool in pools),
        # Integers of a tuple are specialised whatever Triton is told: by 1, and by 16.
        tuple(2 * pool.out_RKXMD.shape[2] + 1 for pool in pools),
        out_RTHD,
        out_RTHD if sinks_H is None else sinks_H,
        NUM_ROWS=num_query_rows,
        GROUP=num_query_rows // num_tokens,
        DIM=dim,
        SPLITS=splits_at_once(most),
        CHANNELS=_CHANNELS,
        NUM_POOLS=len(pools),
        SINKS=sinks_H is not None,
        OVERLAPS=early,
        num_warps=4,
        launch_pdl=early,
    )
    return out_RTHD


def combine_pools_plain(
    pools: Sequence[SplitPartials],
    *,
    num_tokens: int,
    out_dtype: torch.dtype,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The same in PyTorch."""
    partials = [combine_plain(pool, num_tokens=num_tokens) for pool in pools]
    merged = merge_reference(
        [
            PartialAttention(partial.out_RTHD.flatten(0, 1), partial.lse_RTH.flatten(0, 1))
            for partial in partials
        ],
        sinks_H=sinks_H,
        out_dtype=out_dtype,
    )
    return merged.out_THD.view(partials[0].out_RTHD.shape)


@triton.jit
def _combine_pools_kernel(
    outs,
    lses,
    odd_nums_splits,
    out_ptr,
    sinks_ptr,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NUM_POOLS: tl.constexpr,
    SINKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    CHUNKS: tl.constexpr = triton.cdiv(DIM, CHANNELS)
    query_row = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    head = tl.program_id(1)
    row = tl.program_id(2)
    query_head = head * GROUP + query_row % GROUP
    offs_d = chunk * CHANNELS + tl.arange(0, CHANNELS)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    max_lse = -float("inf")
    total = 0.0
    if SINKS:
        max_lse = tl.load(sinks_ptr + query_head).to(tl.float32) * _LOG2_E
        total = 1.0
    acc_D = tl.zeros([CHANNELS], tl.float32)
    for i in tl.static_range(NUM_POOLS):
        num_splits = odd_nums_splits[i] // 2
        place = (row * tl.num_programs(1) + head).to(tl.int64) * num_splits * NUM_ROWS + query_row
        for first in tl.range(0, num_splits, SPLITS):
            offs_s = first + tl.arange(0, SPLITS)
            mask_s = offs_s < num_splits
            out_SD = tl.load(
                outs[i] + (place + offs_s[:, None] * NUM_ROWS) * DIM + offs_d[None, :],
                mask=mask_s[:, None] & (offs_d < DIM)[None, :],
                other=0.0,
            )
            lse_S = tl.load(lses[i] + place + offs_s * NUM_ROWS, mask=mask_s, other=-float("inf"))
            new_max = tl.maximum(max_lse, tl.max(lse_S, 0))
            # Where nothing was seen yet, -inf minus -inf would be NaN.
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
            share_S = tl.math.exp2(lse_S - shift)
            decay = tl.math.exp2(max_lse - shift)
            # What a split that saw nothing left in its place may be anything, NaN included.
            out_SD = tl.where(lse_S[:, None] > -float("inf"), out_SD, 0.0)
            acc_D = acc_D * decay + tl.sum(out_SD * share_S[:, None], 0)
            total = total * decay + tl.sum(share_S, 0)
            max_lse = new_max
    token = row * (NUM_ROWS // GROUP) + query_row // GROUP
    place = token * tl.num_programs(1) * GROUP + query_head
    out_D = acc_D / tl.where(total > 0, total, 1.0)
    out_ptr += place.to(tl.int64) * DIM + offs_d
    tl.store(out_ptr, out_D.to(out_ptr.dtype.element_ty), mask=offs_d < DIM)
