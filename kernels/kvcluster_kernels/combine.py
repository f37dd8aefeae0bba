"""Merges what the splits of a row found into one partial.

    lse = log(sum_x exp(lse_x)),  out = sum_x exp(lse_x - lse) out_x

Shape letters: those of `paging.py`; S splits read together.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.paging import Partial, SplitPartials, overlaps

_LN_2 = tl.constexpr(math.log(2))
_SPLITS_AT_ONCE = 16


def combine(splits: SplitPartials, *, num_tokens: int) -> Partial:
    """The partial over all splits' keys, of `num_tokens` query tokens a row."""
    out_RTHD, lse_RTH = _room(splits, num_tokens)
    num_rows, num_kv_heads, num_splits, num_query_rows, dim = splits.out_RKXMD.shape
    early = overlaps(splits.out_RKXMD.device)
    _combine_kernel[(num_query_rows, num_kv_heads, num_rows)](
        splits.out_RKXMD,
        splits.lse_RKXM,
        out_RTHD,
        lse_RTH,
        num_splits,
        NUM_ROWS=num_query_rows,
        GROUP=num_query_rows // num_tokens,
        DIM=dim,
        SPLITS=triton.next_power_of_2(num_splits),
        CHUNK=min(_SPLITS_AT_ONCE, triton.next_power_of_2(num_splits)),
        OVERLAPS=early,
        num_warps=4,
        launch_pdl=early,
    )
    return Partial(out_RTHD, lse_RTH)


def combine_plain(splits: SplitPartials, *, num_tokens: int) -> Partial:
    """The same in PyTorch."""
    out_RKXMD, lse_RKXM = splits
    num_rows, num_kv_heads, _, num_query_rows, dim = out_RKXMD.shape
    lse_RKXM = lse_RKXM * math.log(2)
    lse_RKM = torch.logsumexp(lse_RKXM, dim=2)
    shift_RKM = torch.where(lse_RKM == -math.inf, 0.0, lse_RKM)
    share_RKXM = torch.exp(lse_RKXM - shift_RKM[:, :, None])
    # What a split that saw nothing left in its place may be anything, NaN included.
    seen = torch.where(share_RKXM[..., None] > 0, out_RKXMD, 0.0)
    out_RKMD = (share_RKXM[..., None] * seen).sum(dim=2)
    group = num_query_rows // num_tokens
    out_RKTGD = out_RKMD.reshape(num_rows, num_kv_heads, num_tokens, group, dim)
    lse_RKTG = lse_RKM.reshape(num_rows, num_kv_heads, num_tokens, group)
    return Partial(out_RKTGD.transpose(1, 2).flatten(2, 3), lse_RKTG.transpose(1, 2).flatten(2, 3))


def _room(splits: SplitPartials, num_tokens: int) -> Partial:
    num_rows, num_kv_heads, _, num_query_rows, dim = splits.out_RKXMD.shape
    shape = (num_rows, num_tokens, num_kv_heads * num_query_rows // num_tokens)
    out_RTHD: Tensor = splits.out_RKXMD.new_empty((*shape, dim))
    return Partial(out_RTHD, splits.lse_RKXM.new_empty(shape))


@triton.jit
def _combine_kernel(
    split_out_ptr: tl.tensor,
    split_lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    num_splits: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    query_row = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(DIM)
    offs_d = tl.arange(0, BLOCK_D)
    place = (row * tl.num_programs(1) + head).to(tl.int64) * num_splits * NUM_ROWS + query_row
    split_lse_ptr += place
    split_out_ptr += place * DIM

    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    offs_x = tl.arange(0, SPLITS)
    lse_X = tl.load(
        split_lse_ptr + offs_x * NUM_ROWS, mask=offs_x < num_splits, other=-float("inf")
    )
    max_lse = tl.max(lse_X, 0)
    shift = tl.where(max_lse == -float("inf"), 0.0, max_lse)
    total = tl.sum(tl.math.exp2(lse_X - shift), 0)

    acc_D = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, num_splits, CHUNK):
        offs_s = first + tl.arange(0, CHUNK)
        lse_S = tl.load(
            split_lse_ptr + offs_s * NUM_ROWS, mask=offs_s < num_splits, other=-float("inf")
        )
        # A split that saw nothing has not written its output.
        seen_S = lse_S > -float("inf")
        out_SD = tl.load(
            split_out_ptr + offs_s[:, None] * (NUM_ROWS * DIM) + offs_d[None, :],
            mask=seen_S[:, None] & (offs_d < DIM)[None, :],
            other=0.0,
        )
        acc_D += tl.sum(out_SD * tl.math.exp2(lse_S - shift)[:, None], 0)

    token = row * (NUM_ROWS // GROUP) + query_row // GROUP
    place = token * tl.num_programs(1) * GROUP + head * GROUP + query_row % GROUP
    safe_total = tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + place.to(tl.int64) * DIM + offs_d, acc_D / safe_total, mask=offs_d < DIM)
    lse = tl.where(total > 0, (shift + tl.math.log2(safe_total)) * _LN_2, -float("inf"))
    tl.store(lse_ptr + place, lse)
