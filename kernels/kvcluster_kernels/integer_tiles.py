"""What a decode kernel does with one block of integer codes: scores of its keys, and the weighted
sum of its values. `integer_decode.py` has the equations.

Sums over channels or tokens are all products of matrices, those with zero-points and the sum of
weights as well: their vector is sixteen equal rows. A matrix unit does that beside what it has to
do anyway, where sums of a thread's own take instructions for each number and exchanges at the end.

Shape letters: those of `integer_decode.py`; P tokens of a part of a block, C bytes of a row of
codes, N sixteen equal rows.
"""

import triton
import triton.language as tl

from kvcluster_kernels.codes import (
    CODE_UNIT,
    dot,
    field_unit,
    num_fields,
    row_bytes,
)
from kvcluster_kernels.integer_loads import SCALE_UNIT, load_fields, load_scales, load_zeros
from kvcluster_kernels.paging import FROM_L2
from kvcluster_kernels.softmax import append, to_base_2, visible_columns

HEADROOM = tl.constexpr(15.0)
"""The largest weight is 2^HEADROOM: float16 then tells 2^-39 of it from nothing."""
_EQUAL_ROWS = tl.constexpr(16)
_LEAST_SCALE = tl.constexpr(2.0**-24)


@triton.jit
def load_query_fields(
    q_ptr: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    num_kv_heads: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    IS_SCALED: tl.constexpr,
) -> tuple[tl.tuple, tl.tensor]:
    """Query rows as columns, float16 [C, M], one array for each field of a byte of codes, divided
    by what the field multiplies codes with if it IS_SCALED; and the power of two, [M], that they
    were divided by, so that none is above 1."""
    C: tl.constexpr = row_bytes(DIM, BITS)
    tokens_M = row * (NUM_ROWS // GROUP) + rows_M // GROUP
    q_ptr += ((tokens_M * num_kv_heads + head) * GROUP + rows_M % GROUP)[None, :] * DIM
    offs_c = tl.arange(0, triton.next_power_of_2(C))
    mask = (offs_c < C)[:, None] & (rows_M < NUM_ROWS)[None, :]
    loaded = ()
    largest_M = tl.zeros([rows_M.shape[0]], tl.float32)
    for field in tl.static_range(num_fields(BITS)):
        q_CM = tl.load(
            q_ptr + field * C + offs_c[:, None], mask=mask, other=0.0, cache_modifier=FROM_L2
        ).to(tl.float32)
        largest_M = tl.maximum(largest_M, tl.max(tl.abs(q_CM), 0))
        loaded = append(loaded, q_CM)
    exponent_M = tl.math.ceil(tl.math.log2(tl.where(largest_M > 0, largest_M, 1.0)))
    shrink_M = tl.math.exp2(-exponent_M)
    fields = ()
    for field in tl.static_range(num_fields(BITS)):
        q_CM = loaded[field] * shrink_M[None, :]
        if IS_SCALED:
            q_CM = q_CM * (1.0 / field_unit(field, BITS))
        fields = append(fields, q_CM.to(tl.float16))
    return fields, tl.math.exp2(exponent_M)


@triton.jit
def fold_queries(
    q_fields: tl.tuple,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tuple, tl.tensor]:
    """For one group of keys: the fields of the queries times the scales of their channels, and
    what the queries make of the zero-points, [M]. With 8 scale bits both are to be multiplied with
    `key_unit`."""
    C: tl.constexpr = row_bytes(DIM, BITS)
    BLOCK_C: tl.constexpr = q_fields[0].shape[0]
    folded = ()
    zero_NM = tl.zeros([_EQUAL_ROWS, q_fields[0].shape[1]], tl.float32)
    for field in tl.static_range(num_fields(BITS)):
        scale_C = load_scales(scale_ptr + field * C, C, BLOCK_C)
        zero_C = load_zeros(zero_ptr + field * C, C, BLOCK_C)
        folded_CM = q_fields[field] * scale_C[:, None]
        meets_CM = q_fields[field]
        if scale_ptr.dtype.element_ty == tl.uint8:
            meets_CM = folded_CM
        some_NM = dot(_equal_rows(zero_C), meets_CM, tl.zeros_like(zero_NM), IS_GPU)
        zero_NM += some_NM * field_unit(field, BITS)
        folded = append(folded, folded_CM)
    return folded, tl.max(zero_NM, 0)


@triton.jit
def key_unit(unit_ptr: tl.tensor, SCALE_BITS: tl.constexpr) -> tl.tensor:
    """What products of `score_codes` are to be multiplied with."""
    return tl.load(unit_ptr) / SCALE_UNIT if SCALE_BITS == 8 else 1.0


@triton.jit
def score_codes(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    folded: tl.tuple,
    zero_M: tl.tensor,
    FIRST: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tensor:
    """products_PM of P tokens of a block from the FIRST on, with what `fold_queries` found for
    their group."""
    FIELDS: tl.constexpr = num_fields(BITS)
    C: tl.constexpr = row_bytes(DIM, BITS)
    offs_p = FIRST + tl.arange(0, P)
    offs_c = tl.arange(0, folded[0].shape[0])
    codes = load_fields(
        codes_ptr, high_ptr, offs_p, offs_c, (offs_c < C)[None, :], C, BITS, offs_c.shape[0] == C,
        IS_GPU, IS_LEVEL=False,
    )  # fmt: skip
    products_PM = tl.zeros([P, zero_M.shape[0]], tl.float32)
    for field in tl.static_range(FIELDS):
        products_PM = dot(codes[field], folded[field], products_PM, IS_GPU)
    return products_PM * CODE_UNIT + zero_M[None, :]


@triton.jit
def score_block(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    q_fields: tl.tuple,
    scale_M: tl.tensor,
    softcap: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    q_positions_M: tl.tensor,
    window: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    """Scores of a block, to base 2, part by part [P, M], as `visible_columns` leaves them."""
    P: tl.constexpr = BLOCK_SIZE // PARTS
    scores = ()
    for group in tl.static_range(GROUPS):
        folded, zero_M = fold_queries(
            q_fields, scale_ptr + group * DIM, zero_ptr + group * DIM, DIM, BITS, IS_GPU
        )
        for part in tl.static_range(group * PARTS // GROUPS, (group + 1) * PARTS // GROUPS):
            products_PM = score_codes(
                codes_ptr, high_ptr, folded, zero_M, part * P, P, DIM, BITS, IS_GPU
            )
            scores_PM = visible_columns(
                to_base_2(products_PM, scale_M[None, :], softcap, HAS_SOFTCAP),
                first + part * P, start, end, position + part * P,
                q_positions_M, window, HAS_POSITIONS, HAS_WINDOW,
            )  # fmt: skip
            scores = append(scores, scores_PM)
    return scores


@triton.jit
def value_exponent(
    scale_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
) -> tl.tensor:
    """Of a power of two that no scale of a block's values is above."""
    if SCALE_BITS == 8:
        largest = tl.load(unit_ptr) / SCALE_UNIT
    else:
        COUNT: tl.constexpr = GROUPS * BLOCK_SIZE
        scales = load_scales(scale_ptr, COUNT, triton.next_power_of_2(COUNT))
        largest = tl.max(scales, 0).to(tl.float32)
    return tl.math.ceil(tl.math.log2(tl.maximum(largest, _LEAST_SCALE)))


@triton.jit
def weigh_codes(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    weights: tl.tuple,
    exponent: tl.tensor,
    acc_DM: tl.tensor,
    zeros_NM: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The sums with a block's values of one group of channels added: of codes, in units of 2^-24,
    and of zero-points. `weights` are those of each part of the block, float16 [P, M], times
    2^exponent."""
    PARTS: tl.constexpr = len(weights)
    P: tl.constexpr = BLOCK_SIZE // PARTS
    C: tl.constexpr = row_bytes(BLOCK_SIZE, BITS)
    FIELDS: tl.constexpr = num_fields(BITS)
    CHUNKS: tl.constexpr = PARTS // FIELDS
    offs_d = tl.arange(0, acc_DM.shape[0])
    offs_p = tl.arange(0, P)
    some_NM = tl.zeros_like(zeros_NM)
    for chunk in tl.static_range(CHUNKS):
        codes = load_fields(
            codes_ptr, high_ptr, offs_d, chunk * P + offs_p, (offs_d < CHANNELS)[:, None], C, BITS,
            offs_d.shape[0] == CHANNELS, IS_GPU, IS_LEVEL=False,
        )  # fmt: skip
        for field in tl.static_range(FIELDS):
            w_PM = weights[field * CHUNKS + chunk]
            place = (field * CHUNKS + chunk) * P
            scale_P = load_scales(scale_ptr + place, P, P)
            zero_P = load_zeros(zero_ptr + place, P, P)
            meets_PM = w_PM
            if scale_ptr.dtype.element_ty == tl.uint8:
                scaled_PM = (
                    w_PM * (scale_P * (1.0 / field_unit(field, BITS))).to(tl.float16)[:, None]
                )
                zero_P = (zero_P * field_unit(field, BITS)).to(tl.float16)
                meets_PM = scaled_PM
            else:
                shrink = tl.math.exp2(-exponent) * (1.0 / field_unit(field, BITS))
                scale_P = (scale_P.to(tl.float32) * shrink).to(tl.float16)
                scaled_PM = w_PM * scale_P[:, None]
            acc_DM = dot(codes[field], scaled_PM, acc_DM, IS_GPU)
            some_NM = dot(_equal_rows(zero_P), meets_PM, some_NM, IS_GPU)
    if scale_ptr.dtype.element_ty != tl.uint8:
        some_NM = some_NM * tl.math.exp2(-exponent)
    return acc_DM, zeros_NM + some_NM


@triton.jit
def weigh_block(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    weights: tl.tuple,
    exponent: tl.tensor,
    decay_M: tl.tensor,
    acc: tl.tuple,
    zeros: tl.tuple,
    CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """`weigh_codes` of every group of channels, earlier sums times their decay."""
    found = ()
    found_zeros = ()
    for group in tl.static_range(len(acc)):
        acc_DM, zeros_NM = weigh_codes(
            codes_ptr + group * (CHANNELS * row_bytes(BLOCK_SIZE, BITS)),
            high_ptr + group * (CHANNELS * row_bytes(BLOCK_SIZE, BITS) // 2),
            scale_ptr + group * BLOCK_SIZE,
            zero_ptr + group * BLOCK_SIZE,
            weights,
            exponent,
            acc[group] * decay_M[None, :],
            zeros[group] * decay_M[None, :],
            CHANNELS,
            BLOCK_SIZE,
            BITS,
            IS_GPU,
        )
        found = append(found, acc_DM)
        found_zeros = append(found_zeros, zeros_NM)
    return found, found_zeros


@triton.jit
def sum_weights(weights: tl.tuple, IS_GPU: tl.constexpr) -> tl.tensor:
    """sum_NM over all parts."""
    P: tl.constexpr = weights[0].shape[0]
    ones_NP = tl.full([_EQUAL_ROWS, P], 1.0, tl.float16)
    sum_NM = tl.zeros([_EQUAL_ROWS, weights[0].shape[1]], tl.float32)
    for part in tl.static_range(len(weights)):
        sum_NM = dot(ones_NP, weights[part], sum_NM, IS_GPU)
    return sum_NM


@triton.jit
def zero_sums(M: tl.constexpr) -> tl.tensor:
    """What `weigh_codes` and `sum_weights` are added to: [N, M]."""
    return tl.zeros([_EQUAL_ROWS, M], tl.float32)


@triton.jit
def equal_rows_product(
    x_ptr: tl.tensor, y_CM: tl.tensor, COUNT: tl.constexpr, IS_GPU: tl.constexpr
) -> tl.tensor:
    """Sums over COUNT numbers of float16 times y, [M]."""
    x_C = load_scales(x_ptr, COUNT, y_CM.shape[0])
    some_NM = tl.zeros([_EQUAL_ROWS, y_CM.shape[1]], tl.float32)
    return tl.max(dot(_equal_rows(x_C), y_CM, some_NM, IS_GPU), 0)


@triton.jit
def _equal_rows(x_C: tl.tensor) -> tl.tensor:
    return tl.broadcast_to(x_C[None, :], (_EQUAL_ROWS, x_C.shape[0]))
