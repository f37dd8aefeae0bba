"""Weighted sums of a block's values in any of the formats that go with latent keys, for kernels.

Scores of a block come as one array. Integers of fewer than 8 bits, and rotated codes, have their
fields in parts of a block, which are met by the weights of that part alone. Codes become numbers
before they are multiplied: beside the expansion of keys that costs little, and leaves no sums of
zero-points to keep.

Shape letters: those of `latent_pages.py`; M query rows of a KV head.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.codes import dot, num_fields, row_bytes
from kvcluster_kernels.integer_decode import IntegerPages, code_bits
from kvcluster_kernels.integer_loads import load_levels, load_scales
from kvcluster_kernels.latent_pages import Latents, SectionForm, section_planes, sections_of
from kvcluster_kernels.latent_tiles import (
    block_planes,
    plane_pointers,
    weigh_integers,
    weigh_latents,
)
from kvcluster_kernels.rotated_decode import RotatedPages
from kvcluster_kernels.rotated_decode import code_bits as rotated_bits
from kvcluster_kernels.softmax import append, store_columns

HEADROOM = tl.constexpr(15.0)
"""The largest weight is 2^HEADROOM: float16 then tells 2^-39 of it from nothing."""
NUMBERS = tl.constexpr(0)
"""Latents, or numbers of 16 bits."""
INTEGERS = tl.constexpr(1)
ROTATED = tl.constexpr(2)

ValuePages = Latents | IntegerPages | RotatedPages
"""Values beside latent keys."""
_PIECE = 64
"""Numbers, or bytes of codes, of a token's latent that are worked on together."""
_LEAST_BYTES = 16
"""Of a row of codes: a matrix product is of 16 numbers at least."""


class ValueFormat(NamedTuple):
    """What a kernel is compiled for."""

    kind: int
    num_heads: int
    """1 where all KV heads share the numbers."""
    dim: int
    """Numbers of a weighted sum."""
    bits: int
    """Of integers and rotated codes."""
    groups: int
    """Groups of channels of integers that share scales."""
    scale_bits: int

    @classmethod
    def of(cls, pages: ValuePages, block_size: int) -> "ValueFormat":
        """Raises: ValueError for pages that no kernel reads."""
        if isinstance(pages, RotatedPages):
            heads, dim = pages.codes.shape[2:4]
            if pages.mean is not None:
                raise ValueError("rotated values want no mean")
            bits = rotated_bits(pages, block_size)
            _check_row(block_size, bits)
            return cls(ROTATED.value, heads, dim, bits, 1, 16)
        if isinstance(pages, IntegerPages):
            heads, dim = pages.codes.shape[2:4]
            bits, groups = code_bits(pages, block_size), pages.scale.shape[3]
            _check_row(block_size, bits)
            scale_bits = 16 if pages.unit is None else 8
            return cls(INTEGERS.value, heads, dim, bits, groups, scale_bits)
        sections = sections_of(pages)
        rank = sum(section.rank for section in sections)
        return cls(NUMBERS.value, sections[0].codes.shape[2], rank, 16, 1, 16)


def section_forms(pages: ValuePages) -> tuple[SectionForm, ...]:
    """Of latents, or of numbers of 16 bits. Raises: ValueError, as `LatentPages.bits`."""
    if isinstance(pages, IntegerPages | RotatedPages):
        return ()
    return tuple(SectionForm.of(section, _PIECE) for section in sections_of(pages))


def value_planes(pages: ValuePages) -> tuple[tuple[Tensor, ...], ...]:
    """Of each section the five planes of `latent_pages.section_planes`."""
    if isinstance(pages, RotatedPages):
        return ((pages.codes, _or(pages.high, pages), pages.scale, pages.codes, pages.codes),)
    if isinstance(pages, IntegerPages):
        high, unit = _or(pages.high, pages), _or(pages.unit, pages)
        return ((pages.codes, high, pages.scale, pages.zero, unit),)
    return tuple(section_planes(section) for section in sections_of(pages))


def _or(plane: Tensor | None, pages: IntegerPages | RotatedPages) -> Tensor:
    return pages.codes if plane is None else plane


def row_fits(block_size: int, bits: int) -> bool:
    """Whether a block's tokens fill enough bytes of such integers or rotated codes."""
    return bool(row_bytes(block_size, bits) >= _LEAST_BYTES)


def _check_row(block_size: int, bits: int) -> None:
    if not row_fits(block_size, bits):
        least = _LEAST_BYTES * num_fields(bits)
        raise ValueError(f"values of {bits} bits want blocks of {least} tokens")


@triton.constexpr_function
def value_kind(form: ValueFormat) -> int:
    return ValueFormat(*form).kind


@triton.constexpr_function
def value_heads(form: ValueFormat) -> int:
    return ValueFormat(*form).num_heads


@triton.constexpr_function
def value_dim(form: ValueFormat) -> int:
    return ValueFormat(*form).dim


@triton.constexpr_function
def value_bits(form: ValueFormat) -> int:
    return ValueFormat(*form).bits


@triton.constexpr_function
def value_groups(form: ValueFormat) -> int:
    return ValueFormat(*form).groups


@triton.constexpr_function
def value_scale_bits(form: ValueFormat) -> int:
    return ValueFormat(*form).scale_bits


@triton.constexpr_function
def value_size(form: ValueFormat, block_size: int) -> int:
    """Bytes of codes that one head of a block has."""
    own = ValueFormat(*form)
    return own.dim * int(row_bytes(block_size, own.bits))


@triton.jit
def value_block(
    planes: tl.tuple,
    strides: tl.tuple,
    page: tl.tensor,
    place: tl.tensor,
    S: tl.constexpr,
    FORM: tl.constexpr,
    FORMS: tl.constexpr,
) -> tl.tuple:
    """Where the planes of one block begin; `place` counts its heads, where it has several."""
    if value_kind(FORM) == NUMBERS:
        found = block_planes(planes, strides, page, place, S, FORMS)
    else:
        at = plane_pointers(
            planes[0], strides[0], page, place, value_size(FORM, S), value_groups(FORM) * S
        )
        found = (at,)
    return found


class _SumShape(NamedTuple):
    """One of the arrays that weighted sums are in."""

    width: int
    first: int
    """Of the numbers of a sum, the first that is in it."""
    num_own: int
    """How many are; the others of its width are none."""


@triton.constexpr_function
def _sum_shapes(form: ValueFormat, forms: tuple[SectionForm, ...]) -> list[_SumShape]:
    form = ValueFormat(*form)
    if form.kind != NUMBERS.value:
        count = form.dim // form.groups
        width = max(_LEAST_BYTES, triton.next_power_of_2(count))
        return [_SumShape(width, group * count, count) for group in range(form.groups)]
    shapes = []
    before = 0
    for section in forms:
        own = SectionForm(*section)
        fields = int(num_fields(own.bits))
        count = own.rank // fields
        shapes += [
            _SumShape(own.piece, before + field * count + first, min(own.piece, count - first))
            for first in range(0, count, own.piece)
            for field in range(fields)
        ]
        before += own.rank
    return shapes


@triton.constexpr_function
def num_sums(form: ValueFormat, forms: tuple[SectionForm, ...]) -> int:
    """Arrays that weighted sums are in."""
    return len(_sum_shapes(form, forms))


@triton.constexpr_function
def sum_width(form: ValueFormat, forms: tuple[SectionForm, ...], place: int) -> int:
    return int(_sum_shapes(form, forms)[place].width)


@triton.constexpr_function
def sum_first(form: ValueFormat, forms: tuple[SectionForm, ...], place: int) -> int:
    """Of the numbers of a sum, the first that is in the array."""
    return int(_sum_shapes(form, forms)[place].first)


@triton.constexpr_function
def sum_own(form: ValueFormat, forms: tuple[SectionForm, ...], place: int) -> int:
    """How many of them are in the array."""
    return int(_sum_shapes(form, forms)[place].num_own)


@triton.jit
def zero_values(FORM: tl.constexpr, FORMS: tl.constexpr, M: tl.constexpr) -> tl.tuple:
    """What `weigh_values` adds to."""
    acc = ()
    for i in tl.static_range(num_sums(FORM, FORMS)):
        if value_kind(FORM) == NUMBERS:
            acc = append(acc, tl.zeros([M, sum_width(FORM, FORMS, i)], tl.float32))
        else:
            acc = append(acc, tl.zeros([sum_width(FORM, FORMS, i), M], tl.float32))
    return acc


@triton.jit
def _halves(x_SM: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    halves = x_SM.reshape(2, x_SM.shape[0] // 2, x_SM.shape[1]).permute(1, 2, 0)
    first, second = tl.split(halves)
    return first, second


@triton.jit
def _parts(x_SM: tl.tensor, COUNT: tl.constexpr) -> tl.tuple:
    """The rows in as many parts, in order."""
    parts = ()
    if COUNT == 1:
        parts = append(parts, x_SM)
    else:
        low, high = _halves(x_SM)
        if COUNT == 2:
            parts = append(append(parts, low), high)
        else:
            first, second = _halves(low)
            third, fourth = _halves(high)
            parts = append(append(append(append(parts, first), second), third), fourth)
    return parts


@triton.jit
def column_online(
    scores_SM: tl.tensor, scale_S: tl.tensor, HAS_SCALE: tl.constexpr, max_M: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Weights of a block times 2^HEADROOM, the new maximum, and what to multiply earlier sums
    with. No weight is then above 2^HEADROOM, nor is one times the scale of its token."""
    exponent = 0.0
    if HAS_SCALE:
        exponent = tl.math.ceil(tl.math.log2(tl.maximum(tl.max(scale_S, 0), 1.0)))
    new_max_M = tl.maximum(max_M, tl.max(scores_SM, 0) + exponent)
    shift_M = tl.where(new_max_M == -float("inf"), 0.0, new_max_M)
    weights_SM = tl.math.exp2(scores_SM - (shift_M - HEADROOM)[None, :])
    return weights_SM, new_max_M, tl.math.exp2(max_M - shift_M)


@triton.jit
def weigh_values(
    blocks: tl.tuple,
    scores_SM: tl.tensor,
    max_M: tl.tensor,
    sum_SM: tl.tensor,
    acc: tl.tuple,
    FORM: tl.constexpr,
    FORMS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tuple]:
    """A block folded in: the new maximum, sums of weights, which stay apart for each place in a
    block, and sums of values. `blocks`: what `value_block` found."""
    S: tl.constexpr = scores_SM.shape[0]
    BITS: tl.constexpr = value_bits(FORM)
    PARTS: tl.constexpr = num_fields(BITS)
    scale_S = tl.zeros([S], tl.float32)
    if value_kind(FORM) == ROTATED:
        scale_S = load_scales(blocks[0][2], S, S).to(tl.float32)
    weights_SM, max_M, decay_M = column_online(
        scores_SM, scale_S, value_kind(FORM) == ROTATED, max_M
    )
    sum_SM = sum_SM * decay_M[None, :] + weights_SM
    if value_kind(FORM) == ROTATED:
        weights = _parts((weights_SM * scale_S[:, None]).to(tl.float16), PARTS)
        fields = load_levels(
            blocks[0][0], blocks[0][1], 0, acc[0].shape[0], S // PARTS, BITS, IS_GPU
        )
        acc_DM = acc[0] * decay_M[None, :]
        for part in tl.static_range(PARTS):
            acc_DM = dot(fields[part], weights[part], acc_DM, IS_GPU)
        acc = (acc_DM,)
    elif value_kind(FORM) == INTEGERS:
        acc = weigh_integers(
            blocks[0], _parts(weights_SM.to(tl.float16), PARTS), decay_M, acc,
            value_dim(FORM) // value_groups(FORM), S, BITS, value_scale_bits(FORM), IS_GPU,
        )  # fmt: skip
    else:
        acc = weigh_latents(blocks, weights_SM, decay_M, acc, FORMS, IS_GPU)
    return max_M, sum_SM, acc


@triton.jit
def store_values(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    acc: tl.tuple,
    max_M: tl.tensor,
    sum_SM: tl.tensor,
    place: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    FORM: tl.constexpr,
    FORMS: tl.constexpr,
) -> None:
    """Write a split's partial, as `store_columns`."""
    sum_M = tl.sum(sum_SM, 0)
    for i in tl.static_range(num_sums(FORM, FORMS)):
        out = acc[i]
        if value_kind(FORM) == NUMBERS:
            out = tl.trans(out)
        store_columns(
            out_ptr, lse_ptr, out, max_M - HEADROOM, sum_M, place,
            rows_M, NUM_ROWS, value_dim(FORM), sum_first(FORM, FORMS, i), sum_own(FORM, FORMS, i),
        )  # fmt: skip
