"""Blocks of latents, and of rotated values beside them, as numbers of 16 bits in line: what is
stored, without the way back.

`latent_plain.restore_latents` and `restore_values` are the definitions. Shape letters: those of
`latent_pages.py`; N blocks of a sequence, X their tokens in line.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.codes import has_assembly, num_fields
from kvcluster_kernels.integer_loads import load_levels, load_scales
from kvcluster_kernels.latent_codes import load_numbers, load_unit
from kvcluster_kernels.latent_pages import (
    Latents,
    SectionForm,
    first_number,
    form_count,
    form_fields,
    form_piece,
    section_planes,
    sections_of,
)
from kvcluster_kernels.latent_tiles import block_planes
from kvcluster_kernels.latent_values import (
    ValueFormat,
    value_bits,
    value_block,
    value_dim,
    value_planes,
)
from kvcluster_kernels.packed_launch import page_strides
from kvcluster_kernels.rotated_decode import RotatedPages

_PIECE = 64


def restore_numbers(pages: Latents, blocks_N: Tensor) -> Tensor:
    """x_XC, float16: the numbers of the tokens of these blocks, as they are stored."""
    sections = sections_of(pages)
    forms = tuple(SectionForm.of(x, _PIECE // num_fields(x.bits)) for x in sections)
    rank = sum(form.rank for form in forms)
    block_size = sections[0].codes.shape[3]
    x_XC = blocks_N.new_empty((len(blocks_N) * block_size, rank), dtype=torch.float16)
    planes = tuple(section_planes(x) for x in sections)
    if len(blocks_N):
        _numbers_kernel[(len(blocks_N),)](
            planes,
            tuple(tuple(page_strides(each)) for each in planes),
            blocks_N,
            x_XC,
            BLOCK_SIZE=block_size,
            PAGE_BLOCKS=sections[0].codes.shape[1],
            RANK=rank,
            FORMS=forms,
            IS_GPU=has_assembly(_numbers_kernel),
        )
    return x_XC


def restore_values(pages: RotatedPages, blocks_N: Tensor, block_size: int) -> Tensor:
    """x_KXD, float16: rotated values of these blocks as they are before the rotation back."""
    form = ValueFormat.of(pages, block_size)
    planes = value_planes(pages)
    num_tokens = len(blocks_N) * block_size
    x_KXD = blocks_N.new_empty((form.num_heads, num_tokens, form.dim), dtype=torch.float16)
    if len(blocks_N):
        _values_kernel[(len(blocks_N), form.num_heads)](
            planes,
            tuple(tuple(page_strides(each)) for each in planes),
            blocks_N,
            x_KXD,
            num_tokens,
            BLOCK_SIZE=block_size,
            PAGE_BLOCKS=planes[0][0].shape[1],
            FORM=form,
            IS_GPU=has_assembly(_values_kernel),
        )
    return x_KXD


@triton.jit(do_not_specialize_on_alignment=("blocks_ptr",))
def _numbers_kernel(
    planes: tl.tuple,
    strides: tl.tuple,
    blocks_ptr: tl.tensor,
    x_ptr: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    RANK: tl.constexpr,
    FORMS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    block = tl.load(blocks_ptr + index)
    page, place = (block // PAGE_BLOCKS).to(tl.int64), block % PAGE_BLOCKS
    blocks = block_planes(planes, strides, page, place, BLOCK_SIZE, FORMS)
    x_ptr += index.to(tl.int64) * (BLOCK_SIZE * RANK)
    for section in tl.static_range(len(FORMS)):
        _store_section(x_ptr, blocks[section], BLOCK_SIZE, RANK, FORMS, section, IS_GPU)


@triton.jit
def _store_section(
    x_ptr: tl.tensor,
    block: tl.tuple,
    S: tl.constexpr,
    RANK: tl.constexpr,
    FORMS: tl.constexpr,
    SECTION: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    P: tl.constexpr = form_piece(FORMS, SECTION)
    COUNT: tl.constexpr = form_count(FORMS, SECTION)
    offs_s, offs_p = tl.arange(0, S), tl.arange(0, P)
    unit = load_unit(block, FORMS, SECTION)
    for piece in tl.static_range(triton.cdiv(COUNT, P)):
        fields = load_numbers(block, unit, piece * P, S, FORMS, SECTION, IS_GPU)
        for field in tl.static_range(form_fields(FORMS, SECTION)):
            place = first_number(FORMS, SECTION) + field * COUNT + piece * P
            tl.store(
                x_ptr + offs_s[:, None] * RANK + place + offs_p[None, :],
                fields[field].to(x_ptr.dtype.element_ty),
                mask=(piece * P + offs_p < COUNT)[None, :],
            )


@triton.jit(do_not_specialize=("num_slots",), do_not_specialize_on_alignment=("blocks_ptr",))
def _values_kernel(
    planes: tl.tuple,
    strides: tl.tuple,
    blocks_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_slots: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    FORM: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    """Numbers of the values of one block and head, which are stored by channel."""
    DIM: tl.constexpr = value_dim(FORM)
    BITS: tl.constexpr = value_bits(FORM)
    P: tl.constexpr = BLOCK_SIZE // num_fields(BITS)
    index, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    block = tl.load(blocks_ptr + index)
    page, place = (block // PAGE_BLOCKS).to(tl.int64), block % PAGE_BLOCKS * num_heads + head
    blocks = value_block(planes, strides, page, place, BLOCK_SIZE, FORM, ())
    x_ptr += (head.to(tl.int64) * num_slots + index * BLOCK_SIZE) * DIM
    fields = load_levels(blocks[0][0], blocks[0][1], 0, DIM, P, BITS, IS_GPU)
    offs_d = tl.arange(0, DIM)
    for part in tl.static_range(num_fields(BITS)):
        scale_P = load_scales(blocks[0][2] + part * P, P, P)
        number_DP = (fields[part] * scale_P[None, :]).to(tl.float16)
        offs_p = part * P + tl.arange(0, P)
        tl.store(x_ptr + offs_p[:, None] * DIM + offs_d[None, :], tl.trans(number_DP))
