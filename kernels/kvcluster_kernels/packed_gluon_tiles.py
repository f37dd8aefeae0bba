"""What the packed decode kernel for Hopper does with one block that is in shared memory.

As `integer_tiles.py`, which has the reasons. Shape letters: those of `integer_decode.py`; N query
rows, C bytes of a row of codes, P tokens of a part of a block, E sixteen equal rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvcluster_kernels.codes import field_unit, num_fields, row_bytes
from kvcluster_kernels.packed_gluon_codes import load_fields, scales_of, zeros_of
from kvcluster_kernels.packed_gluon_copies import append
from kvcluster_kernels.packed_gluon_layouts import (
    byte_of_place,
    copied,
    in_places,
    in_rows,
    key_tile,
    keys_first,
    line,
    operand,
    sums,
    token_line,
    token_of_row,
    turned,
    value_tile,
    values_first,
)
from kvcluster_kernels.paging import FROM_L2
from kvcluster_kernels.softmax import to_base_2

HEADROOM = gl.constexpr(15.0)
"""As `integer_tiles.HEADROOM`."""
LOG2_E = gl.constexpr(1.4426950408889634)
_LEAST_SCALE = gl.constexpr(2.0**-24)


@gluon.jit
def load_queries(
    q_ptr, first_line, num_kv_heads, row_tile, N: gl.constexpr, NUM_ROWS: gl.constexpr,
    GROUP: gl.constexpr, DIM: gl.constexpr, BITS: gl.constexpr, IS_LEVEL: gl.constexpr,
):  # fmt: skip
    """As `integer_tiles.load_query_fields`: fields and the power of two that they were divided by,
    of the second operand's columns. `first_line` is the line of the first row of queries."""
    C: gl.constexpr = row_bytes(DIM, BITS)
    rows_N = row_tile * N + gl.arange(0, N, gl.SliceLayout(0, operand(1)))
    lines_N = first_line + rows_N // GROUP * num_kv_heads * GROUP + rows_N % GROUP
    byte_C = byte_of_place(gl.arange(0, C, gl.SliceLayout(1, operand(1))), C)
    loaded = ()
    largest_N = gl.zeros([N], gl.float32, gl.SliceLayout(0, operand(1)))
    for field in gl.static_range(num_fields(BITS)):
        place_CN = lines_N[None, :] * DIM + field * C + byte_C[:, None]
        q_CN = gl.load(
            q_ptr + place_CN, mask=(rows_N < NUM_ROWS)[None, :], other=0.0, cache_modifier=FROM_L2
        )
        q_CN = q_CN.to(gl.float32)
        largest_N = gl.maximum(largest_N, gl.max(gl.abs(q_CN), 0))
        loaded = append(loaded, q_CN)
    exponent_N = gl.ceil(gl.log2(gl.where(largest_N > 0, largest_N, 1.0)))
    shrink_N = gl.exp2(-exponent_N)
    fields = ()
    for field in gl.static_range(num_fields(BITS)):
        unit_N = shrink_N * (1.0 if IS_LEVEL else 1.0 / field_unit(field, BITS))
        fields = append(fields, (loaded[field] * unit_N[None, :]).to(gl.float16))
    return fields, gl.convert_layout(gl.exp2(exponent_N), gl.SliceLayout(0, sums()))


@gluon.jit
def equal_sums(x_C, y_CN):
    """Sums over C numbers times y, [N]."""
    sum_EN = gl.zeros([16, y_CN.shape[1]], gl.float32, sums())
    return gl.max(mma_v2(x_C[None, :].broadcast_to([16, x_C.shape[0]]), y_CN, sum_EN), 0)


@gluon.jit
def _visible(
    x_PN, first, start, end, position, q_positions_N, window,
    HAS_POSITIONS: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Scores of the P tokens from `first` on, which is at `position`: -inf of those not visible."""
    P: gl.constexpr = x_PN.shape[0]
    token_P = token_of_row(gl.arange(0, P, gl.SliceLayout(1, sums())), P)
    if (first < start) | (first + P > end):
        inside_P = (token_P >= start - first) & (token_P < end - first)
        x_PN = gl.where(inside_P[:, None], x_PN, -float("inf"))
    if HAS_POSITIONS:
        distance_PN = q_positions_N[None, :] - (position + token_P)[:, None]
        keep_PN = distance_PN >= 0
        if HAS_WINDOW:
            keep_PN = keep_PN & (distance_PN < window)
        x_PN = gl.where(keep_PN, x_PN, -float("inf"))
    return x_PN


@gluon.jit
def _load_line(smem, FIRST: gl.constexpr, COUNT: gl.constexpr):
    return smem.slice(FIRST, COUNT).load(line(COUNT))


@gluon.jit
def _fold(
    q_fields, scale_smem, zero_smem, GROUP_INDEX: gl.constexpr, DIM: gl.constexpr,
    BITS: gl.constexpr,
):  # fmt: skip
    """As `integer_tiles.fold_queries`."""
    C: gl.constexpr = row_bytes(DIM, BITS)
    N: gl.constexpr = q_fields[0].shape[1]
    folded = ()
    zero_EN = gl.zeros([16, N], gl.float32, sums())
    for field in gl.static_range(num_fields(BITS)):
        scale_C = _load_line(scale_smem, GROUP_INDEX * DIM + field * C, C)
        zero_C = _load_line(zero_smem, GROUP_INDEX * DIM + field * C, C)
        folded_CN = q_fields[field] * in_places(scales_of(scale_C), 1)[:, None]
        meets_CN = folded_CN if scale_smem.dtype == gl.uint8 else q_fields[field]
        zero_EC = (in_places(zeros_of(zero_C), 0) * field_unit(field, BITS)).to(gl.float16)[None, :]
        zero_EN = mma_v2(zero_EC.broadcast_to([16, C]), meets_CN, zero_EN)
        folded = append(folded, folded_CN)
    return folded, gl.max(zero_EN, 0)


@gluon.jit
def _score_part(
    codes_smem, high_smem, folded, start_PN, PART: gl.constexpr, P: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, DIM: gl.constexpr, BITS: gl.constexpr, IS_LEVEL: gl.constexpr,
):  # fmt: skip
    """start_PN and the products of a part of a block's keys."""
    C: gl.constexpr = row_bytes(DIM, BITS)
    fields = load_fields(
        codes_smem, high_smem, P, PART * P, C, 0, BITS, IS_LEVEL, key_tile(P, C), BLOCK_SIZE, C
    )
    for field in gl.static_range(num_fields(BITS)):
        start_PN = mma_v2(keys_first(fields[field]), folded[field], start_PN)
    return start_PN


@gluon.jit
def score_block(
    keys, q_fields, factor_N, offset_N, scale, softcap, first, start, end, position, q_positions_N,
    window, BLOCK_SIZE: gl.constexpr, PARTS: gl.constexpr, DIM: gl.constexpr, BITS: gl.constexpr,
    GROUPS: gl.constexpr, HAS_POSITIONS: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    HAS_WINDOW: gl.constexpr, IS_LEVEL: gl.constexpr,
):  # fmt: skip
    """Of each part of a block numbers [P, N] that are scores to base 2 where they are multiplied
    with a factor [N] and an offset [N] is added, -inf where they are not visible, and the largest
    of them: with softcap, they are the scores. Products are to be taken times `factor_N` plus
    `offset_N`."""
    P: gl.constexpr = BLOCK_SIZE // PARTS
    N: gl.constexpr = q_fields[0].shape[1]
    CODE_UNIT: gl.constexpr = 1.0 if IS_LEVEL else 2.0**24
    codes, high, scales, zeros = keys
    scores = ()
    largest_N = gl.full([N], -float("inf"), gl.float32, gl.SliceLayout(0, sums()))
    for group in gl.static_range(GROUPS):
        folded = q_fields
        start_PN = gl.zeros([P, N], gl.float32, sums())
        if not IS_LEVEL:
            folded, zero_N = _fold(q_fields, scales, zeros, group, DIM, BITS)
            start_PN += (zero_N * (1.0 / CODE_UNIT))[None, :]
        for part in gl.static_range(group * PARTS // GROUPS, (group + 1) * PARTS // GROUPS):
            x_PN = _score_part(
                codes, high, folded, start_PN, part, P, BLOCK_SIZE, DIM, BITS, IS_LEVEL
            )
            if IS_LEVEL:
                scale_P = in_rows(scales.slice(part * P, P).load(token_line(P)))
                x_PN = x_PN * scale_P.to(gl.float32)[:, None]
            if HAS_SOFTCAP:
                x_PN = x_PN * factor_N[None, :] + offset_N[None, :]
                x_PN = to_base_2(x_PN, scale, softcap, HAS_SOFTCAP)
            x_PN = _visible(
                x_PN, first + part * P, start, end, position + part * P, q_positions_N, window,
                HAS_POSITIONS, HAS_WINDOW,
            )  # fmt: skip
            largest_N = gl.maximum(largest_N, gl.max(x_PN, 0))
            scores = append(scores, x_PN)
    if HAS_SOFTCAP:
        factor_N = gl.full([N], 1.0, gl.float32, gl.SliceLayout(0, sums()))
        offset_N = gl.zeros([N], gl.float32, gl.SliceLayout(0, sums()))
    else:
        factor_N = factor_N * (scale * LOG2_E)
        offset_N = offset_N * (scale * LOG2_E)
    return scores, largest_N, factor_N, offset_N


@gluon.jit
def value_exponent(scale_smem):
    """As `integer_tiles.value_exponent`, of scales of 16 bits."""
    scales = scale_smem.load(copied(scale_smem.shape[0], 2))
    return exponent_of(gl.max(scales, 0).to(gl.float32))


@gluon.jit
def exponent_of(largest):
    """Of a power of two that is not below."""
    return gl.ceil(gl.log2(gl.maximum(largest, _LEAST_SCALE)))


@gluon.jit
def weights_of(scores, largest_N, factor_N, offset_N, exponent, max_N):
    """As `softmax.column_weights`: weights, for products with values, the new maximum, and what to
    multiply earlier sums with; and the sum of weights, in sixteen equal rows."""
    P: gl.constexpr = scores[0].shape[0]
    new_max_N = gl.maximum(max_N, largest_N * factor_N + offset_N + exponent)
    shift_N = gl.where(new_max_N == -float("inf"), 0.0, new_max_N)
    lowered_N = shift_N - offset_N - (exponent + HEADROOM)
    ones_EP = gl.full([16, P], 1.0, gl.float16, operand(0))
    total_EN = gl.zeros([16, max_N.shape[0]], gl.float32, sums())
    weights = ()
    for part in gl.static_range(len(scores)):
        weights_PN = gl.exp2(scores[part] * factor_N[None, :] - lowered_N[None, :])
        weights_PN = turned(weights_PN.to(gl.float16))
        total_EN = mma_v2(ones_EP, weights_PN, total_EN)
        weights = append(weights, weights_PN)
    return weights, new_max_N, gl.exp2(max_N - shift_N), total_EN


@gluon.jit
def _weigh_group(
    acc_DN, codes_smem, high_smem, scale_smem, zero_smem, weights, shrink,
    GROUP_INDEX: gl.constexpr, BLOCK_SIZE: gl.constexpr, DIM: gl.constexpr, BITS: gl.constexpr,
    IS_LEVEL: gl.constexpr,
):  # fmt: skip
    """acc_DN and the weighted codes of one group of channels, and weighted zero-points [16, N]."""
    CHANNELS: gl.constexpr = acc_DN.shape[0]
    N: gl.constexpr = acc_DN.shape[1]
    PARTS: gl.constexpr = len(weights)
    P: gl.constexpr = BLOCK_SIZE // PARTS
    C: gl.constexpr = row_bytes(BLOCK_SIZE, BITS)
    zero_EN = gl.zeros([16, N], gl.float32, sums())
    for chunk in gl.static_range(C // P):
        fields = load_fields(
            codes_smem, high_smem, CHANNELS, GROUP_INDEX * CHANNELS, P, chunk * P, BITS, IS_LEVEL,
            value_tile(CHANNELS, P), DIM, C,
        )  # fmt: skip
        for field in gl.static_range(num_fields(BITS)):
            weights_PN = weights[field * (C // P) + chunk]
            # Of a part, in the order of the bytes' fields.
            scale_P = _load_line(
                scale_smem, GROUP_INDEX * BLOCK_SIZE + (field * (C // P) + chunk) * P, P
            )
            scale_P = in_places(scales_of(scale_P), 1)
            field_shrink = 1.0 if IS_LEVEL else 1.0 / field_unit(field, BITS)
            if scale_smem.dtype == gl.uint8:
                scale_P = (scale_P * field_shrink).to(gl.float16)
            else:
                scale_P = scale_P * (shrink * field_shrink).to(gl.float16)
            scaled_PN = weights_PN * scale_P[:, None]
            acc_DN = mma_v2(values_first(fields[field]), scaled_PN, acc_DN)
            if not IS_LEVEL:
                zero_P = _load_line(
                    zero_smem, GROUP_INDEX * BLOCK_SIZE + (field * (C // P) + chunk) * P, P
                )
                zero_P = in_places(zeros_of(zero_P), 0)
                if scale_smem.dtype == gl.uint8:
                    zero_EP = (
                        (zero_P * field_unit(field, BITS))
                        .to(gl.float16)[None, :]
                        .broadcast_to([16, P])
                    )
                    zero_EN = mma_v2(zero_EP, scaled_PN, zero_EN)
                else:
                    zero_EN = mma_v2(zero_P[None, :].broadcast_to([16, P]), weights_PN, zero_EN)
    if scale_smem.dtype != gl.uint8:
        zero_EN = zero_EN * shrink
    return acc_DN, zero_EN


@gluon.jit
def weigh_block(
    acc, zeros, decay_N, values, weights, shrink, BLOCK_SIZE: gl.constexpr, DIM: gl.constexpr,
    BITS: gl.constexpr, IS_LEVEL: gl.constexpr,
):  # fmt: skip
    """As `integer_tiles.weigh_block`."""
    codes, high, scale, zero = values
    found = ()
    found_zeros = ()
    for group in gl.static_range(len(acc)):
        acc_DN, zero_EN = _weigh_group(
            acc[group] * decay_N[None, :], codes, high, scale, zero, weights, shrink,
            group, BLOCK_SIZE, DIM, BITS, IS_LEVEL,
        )  # fmt: skip
        if not IS_LEVEL:
            zero_EN = zeros[group] * decay_N[None, :] + zero_EN
        found = append(found, acc_DN)
        found_zeros = append(found_zeros, zero_EN)
    return found, found_zeros


@gluon.jit
def store_group(
    out_ptr, lse_ptr, out_DN, max_N, total_N, place, rows_N, NUM_ROWS: gl.constexpr,
    DIM: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """As `softmax.store_columns`, of all channels of out_DN."""
    offs_D = FIRST + gl.arange(0, out_DN.shape[0], gl.SliceLayout(1, sums()))
    safe_N = gl.where(total_N > 0, total_N, 1.0)
    lse_N = gl.where(total_N > 0, max_N + gl.log2(safe_N), -float("inf"))
    gl.store(lse_ptr + place + rows_N, lse_N, mask=rows_N < NUM_ROWS)
    gl.store(
        out_ptr + (place + rows_N)[None, :] * DIM + offs_D[:, None],
        out_DN / safe_N[None, :],
        mask=(rows_N < NUM_ROWS)[None, :],
    )
