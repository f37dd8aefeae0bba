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

from kvcluster_kernels.codes import dot
from kvcluster_kernels.integer_decode import IntegerPages, code_bits
from kvcluster_kernels.integer_loads import load_tile
from kvcluster_kernels.latent_pages import LatentPages
from kvcluster_kernels.latent_tiles import weigh_integers, weigh_latents
from kvcluster_kernels.levels import unpack_levels
from kvcluster_kernels.rotated_decode import RotatedPages
from kvcluster_kernels.softmax import append, store_columns

HEADROOM = tl.constexpr(15.0)
"""The largest weight is 2^HEADROOM: float16 then tells 2^-39 of it from nothing."""
NUMBERS = tl.constexpr(0)
"""Latents, or numbers of 16 bits."""
INTEGERS = tl.constexpr(1)
ROTATED = tl.constexpr(2)

ValuePages = LatentPages | IntegerPages | RotatedPages
"""Values beside latent keys."""


class ValueFormat(NamedTuple):
    """What a kernel is compiled for."""

    kind: int
    num_heads: int
    """1 where all KV heads share the numbers."""
    dim: int
    """Numbers of a weighted sum."""
    bits: int
    groups: int
    """Groups of numbers that share scales: of tokens, or of channels of integers."""
    scale_bits: int
    planes: tuple[Tensor, ...]
    """Four of them; one that is not there is the first again."""

    @classmethod
    def of(cls, pages: ValuePages, block_size: int) -> "ValueFormat":
        """Raises: ValueError for pages that no kernel reads."""
        heads = pages.codes.shape[2]
        if not isinstance(pages, LatentPages) and pages.high is not None:
            raise ValueError("values of 3 bits beside latent keys are read by no kernel")
        if isinstance(pages, RotatedPages):
            bits, rest = divmod(8 * pages.codes.shape[4], block_size)
            if rest or bits not in (4, 2) or pages.mean is not None or pages.high is not None:
                raise ValueError("rotated values want 4 or 2 bits and no mean")
            planes = (pages.codes, pages.scale, pages.scale, pages.scale)
            return cls(ROTATED.value, heads, pages.codes.shape[3], bits, 1, 16, planes)
        scale_bits = 16 if pages.unit is None else 8
        stored = (pages.codes, pages.scale, pages.zero, pages.unit)
        filled = tuple(pages.codes if plane is None else plane for plane in stored)
        if isinstance(pages, IntegerPages):
            if pages.high is not None:
                raise ValueError("integer values beside latents want 8, 4 or 2 bits")
            bits = code_bits(pages, block_size)
            groups = pages.scale.shape[3]
            dim = pages.codes.shape[3]
            return cls(INTEGERS.value, heads, dim, bits, groups, scale_bits, filled[:4])
        groups = 1 if pages.scale is None else pages.scale.shape[3]
        return cls(NUMBERS.value, heads, pages.rank, pages.bits, groups, scale_bits, filled)


@triton.jit
def zero_values(
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    M: tl.constexpr,
) -> tl.tuple:
    """What `weigh_values` adds to."""
    FIELDS: tl.constexpr = 8 // BITS if KIND == NUMBERS and BITS < 16 else 1
    COUNT: tl.constexpr = triton.cdiv(DIM // FIELDS, P) * FIELDS if KIND == NUMBERS else GROUPS
    BLOCK: tl.constexpr = P if KIND == NUMBERS else triton.next_power_of_2(DIM // GROUPS)
    acc = ()
    for _ in tl.static_range(COUNT):
        if KIND == NUMBERS:
            acc = append(acc, tl.zeros([M, BLOCK], tl.float32))
        else:
            acc = append(acc, tl.zeros([max(16, BLOCK), M], tl.float32))
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
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    scores_SM: tl.tensor,
    max_M: tl.tensor,
    sum_SM: tl.tensor,
    acc: tl.tuple,
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tuple]:
    """A block folded in: the new maximum, sums of weights, which stay apart for each place in a
    block, and sums of values. The pointers are at the block's planes, of one head."""
    S: tl.constexpr = scores_SM.shape[0]
    PARTS: tl.constexpr = 1 if KIND == NUMBERS else 8 // BITS
    scale_S = tl.zeros([S], tl.float32)
    if KIND == ROTATED:
        scale_S = tl.load(scale_ptr + tl.arange(0, S)).to(tl.float32)
    weights_SM, max_M, decay_M = column_online(scores_SM, scale_S, KIND == ROTATED, max_M)
    sum_SM = sum_SM * decay_M[None, :] + weights_SM
    if KIND == ROTATED:
        weights = _parts((weights_SM * scale_S[:, None]).to(tl.float16), PARTS)
        packed_DP = load_tile(codes_ptr, DIM, acc[0].shape[0], S // PARTS)
        fields = unpack_levels(packed_DP, BITS, IS_GPU)
        acc_DM = acc[0] * decay_M[None, :]
        for part in tl.static_range(PARTS):
            acc_DM = dot(fields[part], weights[part], acc_DM, IS_GPU)
        acc = (acc_DM,)
    elif KIND == INTEGERS:
        acc = weigh_integers(
            codes_ptr, scale_ptr, zero_ptr, unit_ptr, _parts(weights_SM.to(tl.float16), PARTS),
            decay_M, acc, DIM // GROUPS, S, BITS, SCALE_BITS, IS_GPU,
        )  # fmt: skip
    else:
        acc = weigh_latents(
            codes_ptr, scale_ptr, zero_ptr, unit_ptr, weights_SM, decay_M, acc,
            DIM, P, BITS, GROUPS, SCALE_BITS, IS_GPU,
        )  # fmt: skip
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
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """Write a split's partial, as `store_columns`."""
    FIELDS: tl.constexpr = 8 // BITS if KIND == NUMBERS and BITS < 16 else 1
    # Numbers that a field, or a group of channels, has side by side.
    COUNT: tl.constexpr = DIM // FIELDS if KIND == NUMBERS else DIM // len(acc)
    STEP: tl.constexpr = P if KIND == NUMBERS else COUNT
    sum_M = tl.sum(sum_SM, 0)
    for piece in tl.static_range(len(acc) // FIELDS):
        for field in tl.static_range(FIELDS):
            out = acc[piece * FIELDS + field]
            if KIND == NUMBERS:
                out = tl.trans(out)
            store_columns(
                out_ptr, lse_ptr, out, max_M - HEADROOM, sum_M, place,
                rows_M, NUM_ROWS, DIM, field * COUNT + piece * STEP,
                min(STEP, COUNT - piece * STEP) if KIND == NUMBERS else COUNT,
            )  # fmt: skip
