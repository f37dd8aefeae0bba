"""What the latent decode kernel for Hopper does with the values of one block: levels of rotated
vectors, or integers with scales for each token and group of channels.

Codes are multiplied as they are, as in `packed_gluon_tiles.py`: weights are multiplied with scales,
and zero-points are summed apart.

Shape letters: those of `latent_gluon.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvcluster_kernels.codes import field_unit, num_fields, row_bytes
from kvcluster_kernels.latent_gluon_layouts import (
    in_places,
    line,
    operand,
    sums,
    value_tile,
    values_first,
    weights_second,
)
from kvcluster_kernels.latent_gluon_tiles import append, copy_line
from kvcluster_kernels.packed_gluon_codes import load_fields
from kvcluster_kernels.packed_gluon_layouts import FLAT

CODE_UNIT = gl.constexpr(2.0**24)
"""Codes are multiplied as subnormal numbers."""


@gluon.jit
def value_room(
    codes_ptr, high_ptr, S: gl.constexpr, DIM: gl.constexpr, BITS: gl.constexpr,
    GROUPS: gl.constexpr, IS_LEVEL: gl.constexpr,
):  # fmt: skip
    """Shared memory for two blocks' codes, third bits, scales and zero-points, or what stands for
    those that there are none of."""
    SIZE: gl.constexpr = DIM * row_bytes(S, BITS)
    codes = gl.allocate_shared_memory(codes_ptr.dtype.element_ty, [2, SIZE], FLAT)
    scale = gl.allocate_shared_memory(gl.float16, [2, GROUPS * S], FLAT)
    high = codes
    if BITS == 3:
        high = gl.allocate_shared_memory(high_ptr.dtype.element_ty, [2, SIZE // 2], FLAT)
    zero = scale
    if not IS_LEVEL:
        zero = gl.allocate_shared_memory(gl.float16, [2, GROUPS * S], FLAT)
    return codes, high, scale, zero


@gluon.jit
def start_value_copies(
    room, slot, planes, block, head, num_kv_heads, PAGE_BLOCKS: gl.constexpr,
    BITS: gl.constexpr, IS_LEVEL: gl.constexpr,
):  # fmt: skip
    """Copy one head of a block's values; does not wait. `planes`: pointers, then strides."""
    page, place = (block // PAGE_BLOCKS).to(gl.int64), block % PAGE_BLOCKS * num_kv_heads + head
    for plane in gl.static_range(4):
        if plane == 0 or plane == 2 or (plane == 1 and BITS == 3) or (plane == 3 and not IS_LEVEL):
            start = planes[plane] + page * planes[4 + plane] + place * room[plane].shape[1]
            copy_line(room[plane].index(slot), start, room[plane].shape[1])
    async_copy.commit_group()


@gluon.jit
def largest_scale(room, slot, GROUPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Of all tokens of a block. `LAYOUT`: of a token's weights."""
    scale = room[2].index(slot)
    S: gl.constexpr = scale.shape[0] // GROUPS
    largest_S = scale.slice(0, S, 0).load(LAYOUT)
    for group in gl.static_range(1, GROUPS):
        largest_S = gl.maximum(largest_S, scale.slice(group * S, S, 0).load(LAYOUT))
    return gl.max(largest_S, 0).to(gl.float32)


@gluon.jit
def _row_halves(x):
    """The first and the second half of the rows of x [S, M]."""
    S: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1]
    return gl.split(x.reshape([2, S // 2, M]).permute([1, 2, 0]))


@gluon.jit
def _seconds(x, PARTS: gl.constexpr):
    """The rows of x in 1, 2 or 4 parts, each as the second operand of a product."""
    rows = (x,)
    if PARTS == 2:
        rows = _row_halves(x)
    elif PARTS == 4:
        low, high = _row_halves(x)
        rows = _row_halves(low) + _row_halves(high)
    found = ()
    for part in gl.static_range(PARTS):
        found = append(found, weights_second(rows[part]))
    return found


@gluon.jit
def no_sums(DIM: gl.constexpr, M: gl.constexpr, GROUPS: gl.constexpr):
    """What `weigh_values` adds to: sums of weights, of codes and of zero-points."""
    acc = ()
    zeros = ()
    for _ in gl.static_range(GROUPS):
        acc = append(acc, gl.zeros([DIM // GROUPS, M], gl.float32, sums()))
        zeros = append(zeros, gl.zeros([64, M], gl.float32, sums()))
    return gl.zeros([64, M], gl.float32, sums()), acc, zeros


@gluon.jit
def weigh_values(
    found, room, slot, weights_SM, decay_M, DIM: gl.constexpr, BITS: gl.constexpr,
    GROUPS: gl.constexpr, IS_LEVEL: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Sums times their decay, and those of one block more. `LAYOUT`: of a token's weights."""
    total_EM, acc, zeros = found
    S: gl.constexpr = weights_SM.shape[0]
    PARTS: gl.constexpr = num_fields(BITS)
    P: gl.constexpr = S // PARTS
    CHANNELS: gl.constexpr = DIM // GROUPS
    C: gl.constexpr = row_bytes(S, BITS)
    codes, high = room[0].index(slot), room[1].index(slot)
    scale, zero = room[2].index(slot), room[3].index(slot)
    ones_EP = gl.full([64, P], 1.0, gl.float16, operand(0, 4))
    plain = _seconds(weights_SM, PARTS)
    total_EM = total_EM * decay_M[None, :]
    for part in gl.static_range(PARTS):
        total_EM = mma_v2(ones_EP, plain[part], total_EM)
    more = ()
    more_zeros = ()
    for group in gl.static_range(GROUPS):
        fields = load_fields(
            codes, high, CHANNELS, group * CHANNELS, C, 0, BITS, IS_LEVEL, value_tile(CHANNELS, C),
            DIM, C,
        )  # fmt: skip
        scale_S = scale.slice(group * S, S, 0).load(LAYOUT)
        scaled = _seconds(weights_SM * scale_S[:, None], PARTS)
        acc_DM = acc[group] * decay_M[None, :]
        zero_EM = zeros[group] * decay_M[None, :]
        for part in gl.static_range(PARTS):
            scaled_PM = scaled[part]
            if not IS_LEVEL:
                scaled_PM = (scaled_PM * (1.0 / field_unit(part, BITS))).to(gl.float16)
                zero_P = in_places(zero.slice(group * S + part * P, P, 0).load(line(P)))
                zero_EP = zero_P[None, :].broadcast_to([64, P])
                zero_EM = mma_v2(zero_EP, plain[part], zero_EM)
            acc_DM = mma_v2(values_first(fields[part]), scaled_PM, acc_DM)
        more = append(more, acc_DM)
        more_zeros = append(more_zeros, zero_EM)
    return total_EM, more, more_zeros


@gluon.jit
def store_values(
    out_ptr, lse_ptr, found, max_M, place, rows_M, NUM_ROWS: gl.constexpr, DIM: gl.constexpr,
    GROUPS: gl.constexpr, IS_LEVEL: gl.constexpr,
):  # fmt: skip
    """Write a split's partial; `max_M` is that of scores less what weights are times, to base 2."""
    total_EM, acc, zeros = found
    CHANNELS: gl.constexpr = DIM // GROUPS
    total_M = gl.max(total_EM, 0)
    safe_M = gl.where(total_M > 0, total_M, 1.0)
    lse_M = gl.where(total_M > 0, max_M + gl.log2(safe_M), -float("inf"))
    gl.store(lse_ptr + place + rows_M, lse_M, mask=rows_M < NUM_ROWS)
    offs_d = gl.arange(0, CHANNELS, gl.SliceLayout(1, sums()))
    for group in gl.static_range(GROUPS):
        out_DM = acc[group]
        if not IS_LEVEL:
            zero_M = gl.max(zeros[group], 0)
            out_DM = out_DM * CODE_UNIT + zero_M[None, :]
        gl.store(
            out_ptr + (place + rows_M)[None, :] * DIM + (group * CHANNELS + offs_d)[:, None],
            out_DM / safe_M[None, :],
            mask=(rows_M < NUM_ROWS)[None, :],
        )
