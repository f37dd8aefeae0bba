"""Queries, keys and values of single rows on their way to attention: turned to their positions,
and keys and values written where the cache has their slots. One kernel.

Shape letters: R rows, H query heads, K KV heads, X heads of queries, keys and values, D head
dimension, P pages, S slots of a page.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.paging import let_next_start, overlaps


class Slots(NamedTuple):
    """Where rows go in the pages of a layer."""

    k_PKSD: Tensor
    v_PKSD: Tensor
    pages_R: Tensor
    offsets_R: Tensor
    """Inside the pages. Both int64."""


def rotate_and_write(qkv_RXD: Tensor, cos_RD: Tensor, sin_RD: Tensor, slots: Slots) -> Tensor:
    """q_RHD, turned. `qkv_RXD`: the heads of queries, then of keys, then of values. Mutates the
    pages.

    Raises: ValueError for arrays that do not go together.
    """
    num_rows, num_heads, dim = qkv_RXD.shape
    num_kv_heads = slots.k_PKSD.shape[1]
    num_query_heads = num_heads - 2 * num_kv_heads
    if (
        cos_RD.shape != (num_rows, dim)
        or sin_RD.shape != cos_RD.shape
        or slots.k_PKSD.shape != slots.v_PKSD.shape
        or slots.k_PKSD.shape[3] != dim
        or num_query_heads < 1
        or dim % 2
    ):
        raise ValueError(
            f"heads {tuple(qkv_RXD.shape)}, turns {tuple(cos_RD.shape)} and pages "
            f"{tuple(slots.k_PKSD.shape)}, {tuple(slots.v_PKSD.shape)} do not go together"
        )
    if not all(x.is_contiguous() for x in (qkv_RXD, cos_RD, sin_RD)) or any(
        x.stride()[2:] != (dim, 1) for x in slots[:2]
    ):
        raise ValueError("heads, turns and the slots of a page must be contiguous")
    q_RHD = torch.empty(
        (num_rows, num_query_heads, dim), dtype=qkv_RXD.dtype, device=qkv_RXD.device
    )
    early = overlaps(qkv_RXD.device)
    _rotate_kernel[(num_heads, num_rows)](
        qkv_RXD,
        cos_RD,
        sin_RD,
        slots.pages_R,
        slots.offsets_R,
        q_RHD,
        slots.k_PKSD,
        slots.v_PKSD,
        *slots.k_PKSD.stride()[:2],
        *slots.v_PKSD.stride()[:2],
        NUM_QUERY_HEADS=num_query_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=dim // 2,
        PADDED_HALF=triton.next_power_of_2(dim // 2),
        OVERLAPS=early,
        num_warps=1,
        launch_pdl=early,
    )
    return q_RHD


@triton.jit
def _rotate_kernel(
    qkv_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    stride_k_page: tl.tensor,
    stride_k_head: tl.tensor,
    stride_v_page: tl.tensor,
    stride_v_head: tl.tensor,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    DIM: tl.constexpr = 2 * HALF
    let_next_start(OVERLAPS)
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, PADDED_HALF)
    mask_d = offs_d < HALF
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    qkv_ptr += (row * (NUM_QUERY_HEADS + 2 * NUM_KV_HEADS) + head) * DIM
    first_D = tl.load(qkv_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    second_D = tl.load(qkv_ptr + HALF + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    page = tl.load(pages_ptr + row)
    offset = tl.load(offsets_ptr + row)
    if head < NUM_QUERY_HEADS + NUM_KV_HEADS:
        cos_ptr += row * DIM
        sin_ptr += row * DIM
        cos_1D = tl.load(cos_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        cos_2D = tl.load(cos_ptr + HALF + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        sin_1D = tl.load(sin_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        sin_2D = tl.load(sin_ptr + HALF + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        turned_D = first_D * cos_1D - second_D * sin_1D
        second_D = second_D * cos_2D + first_D * sin_2D
        first_D = turned_D
    if head < NUM_QUERY_HEADS:
        out_ptr = q_ptr + (row * NUM_QUERY_HEADS + head) * DIM
    elif head < NUM_QUERY_HEADS + NUM_KV_HEADS:
        kv_head = head - NUM_QUERY_HEADS
        out_ptr = k_ptr + page * stride_k_page + kv_head * stride_k_head + offset * DIM
    else:
        kv_head = head - NUM_QUERY_HEADS - NUM_KV_HEADS
        out_ptr = v_ptr + page * stride_v_page + kv_head * stride_v_head + offset * DIM
    tl.store(out_ptr + offs_d, first_D.to(q_ptr.dtype.element_ty), mask=mask_d)
    tl.store(out_ptr + HALF + offs_d, second_D.to(q_ptr.dtype.element_ty), mask=mask_d)
