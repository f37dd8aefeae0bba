"""Merges attention over different keys into attention over all of them (online softmax; Milakov
and Gimelshein 2018), in one pass over the partials.

Shape letters: T query tokens, H query heads, D value dimension, R rows: heads of tokens.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.prefill_arguments import PartialAttention

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_AT_ONCE = (1, 2, 4, 8)
"""Partials that one pass has room for; more are merged in several. Few sizes, because each is
compiled."""


@triton.jit(do_not_specialize=["num_rows", "num_partials"])
def _merge(
    outs,
    lses,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    num_rows,
    num_partials,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PLACES: tl.constexpr,
    SINKS: tl.constexpr,
):
    rows_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_R = rows_R < num_rows
    offs_D = tl.arange(0, PADDED_DIM)
    offs_RD = rows_R[:, None] * DIM + offs_D[None, :]
    mask_RD = mask_R[:, None] & (offs_D < DIM)[None, :]
    max2_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if SINKS:
        sink2_R = tl.load(sinks_ptr + rows_R % NUM_HEADS, mask=mask_R, other=0.0) * _LOG2_E
        max2_R = sink2_R
    for i in tl.static_range(PLACES):
        is_there_R = rows_R < tl.where(num_partials > i, num_rows, 0)
        lse2_R = tl.load(lses[i] + rows_R, mask=is_there_R, other=float("-inf")) * _LOG2_E
        max2_R = tl.maximum(max2_R, lse2_R)
    # Nobody saw a key: -inf minus -inf is NaN.
    shift_R = tl.where(max2_R == float("-inf"), 0.0, max2_R)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    if SINKS:
        sum_R = tl.exp2(sink2_R - shift_R)
    acc_RD = tl.zeros([BLOCK_R, PADDED_DIM], tl.float32)
    for i in tl.static_range(PLACES):
        is_there_R = rows_R < tl.where(num_partials > i, num_rows, 0)
        lse2_R = tl.load(lses[i] + rows_R, mask=is_there_R, other=float("-inf")) * _LOG2_E
        share_R = tl.exp2(lse2_R - shift_R)
        sum_R += share_R
        is_there_RD = mask_RD & is_there_R[:, None]
        part_RD = tl.load(outs[i] + offs_RD, mask=is_there_RD, other=0.0).to(tl.float32)
        acc_RD += share_R[:, None] * part_RD
    seen_R = sum_R > 0.0
    divisor_R = tl.where(seen_R, sum_R, 1.0)
    out_RD = (acc_RD / divisor_R[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_RD, out_RD, mask=mask_RD)
    lse_R = tl.where(seen_R, (max2_R + tl.log2(divisor_R)) * _LN_2, float("-inf"))
    tl.store(lse_ptr + rows_R, lse_R, mask=mask_R)


def merge(
    partials: Sequence[PartialAttention],
    *,
    sinks_H: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out: PartialAttention | None = None,
) -> PartialAttention:
    """Exact attention over the keys of all partials, of which there is one at least; no two may
    share a key. `sinks_H`: one more logit a head, whose value is zero. `out`: written, if given;
    may be one of the partials. On a CPU in Triton's interpreter.

    Raises: ValueError when the partials are not of the same rows.
    """
    _check(partials)
    most = _AT_ONCE[-1]
    while len(partials) > most:
        partials = [merge(partials[:most]), *partials[most:]]
    num_tokens, num_heads, dim = partials[0].out_THD.shape
    if out is None:
        out = PartialAttention(
            partials[0].out_THD.new_empty((num_tokens, num_heads, dim), dtype=out_dtype),
            partials[0].lse_TH.new_empty((num_tokens, num_heads)),
        )
    if out.lse_TH.numel() == 0:
        return out
    block_r = 16
    places = next(size for size in _AT_ONCE if len(partials) <= size)
    _merge[(triton.cdiv(num_tokens * num_heads, block_r),)](
        _placed([partial.out_THD for partial in partials], places),
        _placed([partial.lse_TH for partial in partials], places),
        *out,
        out.lse_TH if sinks_H is None else sinks_H.float(),
        num_tokens * num_heads,
        len(partials),
        NUM_HEADS=num_heads,
        DIM=dim,
        PADDED_DIM=triton.next_power_of_2(dim),
        BLOCK_R=block_r,
        PLACES=places,
        SINKS=sinks_H is not None,
        num_warps=4,
    )
    return out


def _placed(planes: Sequence[Tensor], places: int) -> tuple[Tensor, ...]:
    """With the first one in places that nothing is read of."""
    placed = [plane.contiguous() for plane in planes]
    return (*placed, *placed[:1] * (places - len(placed)))


def merge_reference(
    partials: Sequence[PartialAttention],
    *,
    sinks_H: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> PartialAttention:
    """The same in plain PyTorch; in float64 for partials of float64."""
    _check(partials)
    outs = [partial.out_THD for partial in partials]
    lses = [partial.lse_TH for partial in partials]
    if sinks_H is not None:
        outs.append(torch.zeros_like(outs[0]))
        lses.append(sinks_H.to(lses[0].dtype).expand_as(lses[0]))
    lse_ZTH = torch.stack(lses)
    lse_TH = torch.logsumexp(lse_ZTH, dim=0)
    shift_TH = torch.where(lse_TH == -torch.inf, 0.0, lse_TH)
    share_ZTH = torch.exp(lse_ZTH - shift_TH)
    out_THD = (share_ZTH[..., None] * torch.stack(outs)).sum(dim=0)
    return PartialAttention(
        out_THD.to(out_THD.dtype if out_THD.dtype == torch.float64 else out_dtype), lse_TH
    )


def _check(partials: Sequence[PartialAttention]) -> None:
    if not partials:
        raise ValueError("merge: want at least one partial")
    shapes = {tuple(partial.out_THD.shape) for partial in partials}
    shapes |= {(*partial.lse_TH.shape, *partials[0].out_THD.shape[2:]) for partial in partials}
    if len(shapes) != 1:
        raise ValueError(f"merge: partials of different rows, {sorted(shapes)}")
