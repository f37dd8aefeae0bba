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
_SPLITS_AT_ONCE = (16, 64, 128, 256)
"""Whose outputs a program asks for at once: all of them, as a rule, so that it waits only once. Few
sizes, because each is compiled."""
_CHANNELS = 32
"""Of a program: a line of memory of each split, and several programs for every query row."""


def combine(splits: SplitPartials, *, num_tokens: int) -> Partial:
    """The partial over all splits' keys, of `num_tokens` query tokens a row."""
    out_RTHD, lse_RTH = _room(splits, num_tokens)
    num_rows, num_kv_heads, num_splits, num_query_rows, dim = splits.out_RKXMD.shape
    early = overlaps(splits.out_RKXMD.device)
    chunks = triton.cdiv(dim, _CHANNELS)
    _combine_kernel[(num_query_rows * chunks, num_kv_heads, num_rows)](
        splits.out_RKXMD,
        splits.lse_RKXM,
        out_RTHD,
        lse_RTH,
        num_splits,
        NUM_ROWS=num_query_rows,
        GROUP=num_query_rows // num_tokens,
        DIM=dim,
        SPLITS=splits_at_once(num_splits),
        CHANNELS=_CHANNELS,
        OVERLAPS=early,
        num_warps=4,
        launch_pdl=early,
    )
    return Partial(out_RTHD, lse_RTH)


def splits_at_once(num_splits: int) -> int:
    """Splits that are read together where there are so many."""
    return next((size for size in _SPLITS_AT_ONCE if num_splits <= size), _SPLITS_AT_ONCE[-1])


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


@triton.jit(do_not_specialize=("num_splits",))
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
    CHANNELS: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    CHUNKS: tl.constexpr = triton.cdiv(DIM, CHANNELS)
    query_row = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    head = tl.program_id(1)
    row = tl.program_id(2)
    offs_d = chunk * CHANNELS + tl.arange(0, CHANNELS)
    place = (row * tl.num_programs(1) + head).to(tl.int64) * num_splits * NUM_ROWS + query_row
    split_lse_ptr += place
    split_out_ptr += place * DIM

    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    max_lse = -float("inf")
    total = 0.0
    acc_D = tl.zeros([CHANNELS], tl.float32)
    for first in tl.range(0, num_splits, SPLITS):
        offs_s = first + tl.arange(0, SPLITS)
        out_SD = tl.load(
            split_out_ptr + offs_s[:, None] * (NUM_ROWS * DIM) + offs_d[None, :],
            mask=(offs_s < num_splits)[:, None] & (offs_d < DIM)[None, :],
            other=0.0,
        )
        lse_S = tl.load(
            split_lse_ptr + offs_s * NUM_ROWS, mask=offs_s < num_splits, other=-float("inf")
        )
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
    place = token * tl.num_programs(1) * GROUP + head * GROUP + query_row % GROUP
    safe_total = tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + place.to(tl.int64) * DIM + offs_d, acc_D / safe_total, mask=offs_d < DIM)
    lse = tl.where(total > 0, (max_lse + tl.math.log2(safe_total)) * _LN_2, -float("inf"))
    tl.store(lse_ptr + place, lse, mask=chunk == 0)
