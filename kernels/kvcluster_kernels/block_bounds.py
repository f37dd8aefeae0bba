"""How much a block of keys could be worth to a query, from its least and largest numbers (Quest,
arXiv 2406.10774).

Shape letters: J queries (R where each is of a sequence of its own), H query heads, K KV heads, B
blocks, D head dimension.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 16
"""Of a program: their numbers in float64 are half the registers that threads may have."""


def largest_bounds(q_JHD: Tensor, low_KBD: Tensor, high_KBD: Tensor, scale: float) -> Tensor:
    """bound_KJB, float32: no `scale * q . k` of any query head of the KV head is larger, of a key
    in the block. Sums are float64, whose order does not show in what is compared.
    `block_bounds_plain.largest_bounds` is the definition. On a CPU in Triton's interpreter.

    Raises: ValueError for arrays that do not go together.
    """
    num_queries, num_heads, dim = q_JHD.shape
    num_kv_heads, num_blocks, _ = low_KBD.shape
    if low_KBD.shape != high_KBD.shape or low_KBD.shape[2] != dim or num_heads % num_kv_heads:
        raise ValueError(
            f"bounds: queries {tuple(q_JHD.shape)}, blocks of {tuple(low_KBD.shape)} and "
            f"{tuple(high_KBD.shape)}"
        )
    low_KBD, high_KBD = low_KBD.contiguous(), high_KBD.contiguous()
    bound_KJB = torch.empty(num_kv_heads, num_queries, num_blocks, device=q_JHD.device)
    if bound_KJB.numel():
        _launch(q_JHD, low_KBD, high_KBD, None, bound_KJB, scale)
    return bound_KJB


class BoundsOfRows(NamedTuple):
    """Least and largest numbers of the blocks of sequences, of which each query has its own."""

    low_R: Tensor
    """int64: where low_KBD begins, an array of the dtype of the queries that lies in one piece."""
    high_R: Tensor
    """Likewise."""
    counts_R: Tensor
    """int32: the blocks of each."""
    num_kv_heads: int


def largest_bounds_of_rows(
    q_RHD: Tensor, bounds: BoundsOfRows, *, width: int, scale: float
) -> Tensor:
    """bound_KRB, of `width` blocks; behind a sequence's last one is anything. What is pointed at
    may be elsewhere at each call, also of a CUDA graph."""
    size = (bounds.num_kv_heads, len(q_RHD), width)
    bound_KRB = torch.empty(size, device=q_RHD.device)
    _launch(q_RHD, bounds.low_R, bounds.high_R, bounds.counts_R, bound_KRB, scale)
    return bound_KRB


def _launch(
    q_JHD: Tensor,
    low: Tensor,
    high: Tensor,
    counts_J: Tensor | None,
    bound_KJB: Tensor,
    scale: float,
) -> None:
    num_kv_heads, num_queries, num_blocks = bound_KJB.shape
    dim = q_JHD.shape[2]
    _bounds_kernel[(triton.cdiv(num_blocks, _BLOCKS), num_kv_heads, num_queries)](
        q_JHD.contiguous(),
        low,
        high,
        counts_J,
        bound_KJB,
        num_blocks,
        SCALE=scale,
        GROUP=q_JHD.shape[1] // num_kv_heads,
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCKS=_BLOCKS,
    )


@triton.jit(do_not_specialize=["width"])
def _bounds_kernel(
    q_ptr,
    low_ptr,
    high_ptr,
    counts_ptr,
    bound_ptr,
    width,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    query, num_queries = tl.program_id(2), tl.num_programs(2)
    num_blocks = width
    if counts_ptr is not None:
        num_blocks = tl.load(counts_ptr + query)
        # Memory of torch begins at multiples of more than this.
        low_ptr = tl.multiple_of(tl.load(low_ptr + query).to(q_ptr.dtype), 16)
        high_ptr = tl.multiple_of(tl.load(high_ptr + query).to(q_ptr.dtype), 16)
    offs_D = tl.arange(0, BLOCK_D)
    blocks_B = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask_BD = (blocks_B < num_blocks)[:, None] & (offs_D < DIM)[None, :]
    rows_B = head.to(tl.int64) * num_blocks + blocks_B
    places_BD = rows_B[:, None] * DIM + offs_D[None, :]
    low_BD = tl.load(low_ptr + places_BD, mask=mask_BD, other=0.0).to(tl.float64)
    high_BD = tl.load(high_ptr + places_BD, mask=mask_BD, other=0.0).to(tl.float64)
    # A plain number would be rounded to float32 on its way into the kernel.
    scale = tl.full([1], SCALE, tl.float64)
    largest_B = tl.full([BLOCKS], -float("inf"), tl.float64)
    q_ptr += ((query * num_kv_heads + head) * GROUP).to(tl.int64) * DIM
    for place in range(GROUP):
        q_D = tl.load(q_ptr + place * DIM + offs_D, mask=offs_D < DIM, other=0.0)
        q_D = q_D.to(tl.float64) * scale
        corner_BD = tl.where((q_D > 0)[None, :], high_BD, low_BD)
        largest_B = tl.maximum(largest_B, tl.sum(q_D[None, :] * corner_BD, 1))
    place = (head.to(tl.int64) * num_queries + query) * width
    tl.store(bound_ptr + place + blocks_B, largest_B.to(tl.float32), mask=blocks_B < num_blocks)
