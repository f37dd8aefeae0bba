"""What a decode kernel does with one block of integer codes: scores of its keys, and the weighted
sum of its values. `integer_decode.py` has the equations.

Shape letters: those of `integer_decode.py`; C bytes of a row of codes, so that each of its fields
is C channels (keys) or C tokens (values).
"""

import triton
import triton.language as tl

from kvcluster_kernels.codes import CODE_UNIT, dot_codes
from kvcluster_kernels.softmax import online_columns

_LEAST_SCALE = tl.constexpr(2.0**-24)


@triton.jit
def load_query_parts(
    q_ptr: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    num_kv_heads: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Query rows as columns [C, M], one array for each field of a byte of codes, divided
    by what the field multiplies codes with; and the power of two, [M], that they were divided by,
    so that none is above 1."""
    C: tl.constexpr = DIM * BITS // 8
    tokens_M = row * (NUM_ROWS // GROUP) + rows_M // GROUP
    q_ptr += ((tokens_M * num_kv_heads + head) * GROUP + rows_M % GROUP)[None, :] * DIM
    offs_c = tl.arange(0, triton.next_power_of_2(C))
    mask = (offs_c < C)[:, None] & (rows_M < NUM_ROWS)[None, :]
    q0 = tl.load(q_ptr + offs_c[:, None], mask=mask, other=0.0).to(tl.float32)
    q1 = q0
    q2 = q0
    q3 = q0
    largest_M = tl.max(tl.abs(q0), 0)
    if BITS < 8:
        q1 = tl.load(q_ptr + C + offs_c[:, None], mask=mask, other=0.0).to(tl.float32)
        largest_M = tl.maximum(largest_M, tl.max(tl.abs(q1), 0))
    if BITS < 4:
        q2 = tl.load(q_ptr + 2 * C + offs_c[:, None], mask=mask, other=0.0).to(tl.float32)
        q3 = tl.load(q_ptr + 3 * C + offs_c[:, None], mask=mask, other=0.0).to(tl.float32)
        largest_M = tl.maximum(largest_M, tl.max(tl.maximum(tl.abs(q2), tl.abs(q3)), 0))
    exponent_M = tl.math.ceil(tl.math.log2(tl.where(largest_M > 0, largest_M, 1.0)))
    shrink = tl.math.exp2(-exponent_M)[None, :]
    q1 = q1 * (shrink / 2**BITS)
    q2 = q2 * (shrink / 2 ** (2 * BITS))
    q3 = q3 * (shrink / 2 ** (3 * BITS))
    # Kept in the dtype that they came in, which loses nothing: registers are scarce.
    kept: tl.constexpr = q_ptr.dtype.element_ty
    return (q0 * shrink).to(kept), q1.to(kept), q2.to(kept), q3.to(kept), tl.math.exp2(exponent_M)


@triton.jit
def score_codes(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    q0: tl.tensor,
    q1: tl.tensor,
    q2: tl.tensor,
    q3: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tensor:
    """products_SM of the queries and the keys of a block."""
    C: tl.constexpr = DIM * BITS // 8
    TOKENS: tl.constexpr = BLOCK_SIZE // GROUPS
    BLOCK_M: tl.constexpr = q0.shape[1]
    offs_c = tl.arange(0, triton.next_power_of_2(C))
    tokens_GS = tl.arange(0, GROUPS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    packed_GSC = _load(
        codes_ptr + tokens_GS[:, :, None] * C + offs_c[None, None, :],
        (offs_c < C)[None, None, :],
        offs_c.shape[0] == C,
    )
    f0, zero_GM = _fold(q0, scale_ptr, zero_ptr, unit_ptr, 0, DIM, BITS, GROUPS)
    f1 = f0
    f2 = f0
    f3 = f0
    if BITS < 8:
        f1, more_GM = _fold(q1, scale_ptr, zero_ptr, unit_ptr, 1, DIM, BITS, GROUPS)
        zero_GM += more_GM
    if BITS < 4:
        f2, more_GM = _fold(q2, scale_ptr, zero_ptr, unit_ptr, 2, DIM, BITS, GROUPS)
        zero_GM += more_GM
        f3, more_GM = _fold(q3, scale_ptr, zero_ptr, unit_ptr, 3, DIM, BITS, GROUPS)
        zero_GM += more_GM
    products_GSM = dot_codes(
        packed_GSC, f0, f1, f2, f3, tl.zeros([GROUPS, TOKENS, BLOCK_M], tl.float32), BITS, IS_GPU
    )
    products_GSM = products_GSM * CODE_UNIT + zero_GM[:, None, :]
    return products_GSM.reshape(BLOCK_SIZE, BLOCK_M)


@triton.jit
def weigh_codes(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    scores_SM: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    acc_EDM: tl.tensor,
    zeros_EM: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The sums with a block's values added: of codes, in units of 2^(8 - BITS - 24), of
    zero-points, the new maximum, and the sum of weights."""
    C: tl.constexpr = BLOCK_SIZE * BITS // 8
    CHANNELS: tl.constexpr = DIM // GROUPS
    E: tl.constexpr = acc_EDM.shape[0]
    offs_e = tl.arange(0, E)
    offs_d = tl.arange(0, acc_EDM.shape[1])
    channels_ED = offs_e[:, None] * CHANNELS + offs_d[None, :]
    mask_ED = (offs_e < GROUPS)[:, None] & (offs_d < CHANNELS)[None, :]
    packed_EDC = _load(
        codes_ptr + channels_ED[:, :, None] * C + tl.arange(0, C)[None, None, :],
        mask_ED[:, :, None],
        E * acc_EDM.shape[1] == DIM,
    )
    offs_s = tl.arange(0, BLOCK_SIZE)
    scale_ES, zero_ES = _read_scales(
        scale_ptr,
        zero_ptr,
        unit_ptr,
        offs_e[:, None] * BLOCK_SIZE + offs_s[None, :],
        (offs_e < GROUPS)[:, None],
        E == GROUPS,
    )
    boost_S = tl.math.log2(tl.maximum(tl.max(scale_ES, 0), _LEAST_SCALE))
    weights_SM, max_M, sum_M, decay_M = online_columns(scores_SM, boost_S, max_M, sum_M)
    zeros_EM = zeros_EM * decay_M[None, :] + tl.sum(weights_SM[None, :, :] * zero_ES[:, :, None], 1)
    w_ESM = (weights_SM[None, :, :] * scale_ES[:, :, None]).to(tl.float16)
    w0 = w_ESM
    w1 = w_ESM
    w2 = w_ESM
    w3 = w_ESM
    # The last field of a byte multiplies codes most: what meets the others is made up for it.
    if BITS == 4:
        w0, w1 = _halves(w_ESM)
        w0 = w0 * 16.0
    if BITS == 2:
        w1, w3 = _halves(w_ESM)
        w0, w1 = _halves(w1 * 16.0)
        w2, w3 = _halves(w3)
        w0 = w0 * 4.0
        w2 = w2 * 4.0
    acc_EDM = acc_EDM * decay_M[None, None, :]
    acc_EDM = dot_codes(packed_EDC, w0, w1, w2, w3, acc_EDM, BITS, IS_GPU)
    return acc_EDM, zeros_EM, max_M, sum_M


@triton.jit
def empty_sums(
    DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """What `weigh_codes` adds to: acc_EDM and zeros_EM."""
    E: tl.constexpr = triton.next_power_of_2(GROUPS)
    D: tl.constexpr = triton.next_power_of_2(DIM // GROUPS)
    return tl.zeros([E, D, BLOCK_M], tl.float32), tl.zeros([E, BLOCK_M], tl.float32)


@triton.jit
def _fold(
    q_CM: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    FIELD: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Queries of one field times the scale of each group's channels, [G, C, M], and the sum of
    what they make of the zero-points, [G, M]."""
    C: tl.constexpr = DIM * BITS // 8
    offs_g = tl.arange(0, GROUPS)
    offs_c = tl.arange(0, q_CM.shape[0])
    offs_GC = offs_g[:, None] * DIM + FIELD * C + offs_c[None, :]
    scale_GC, zero_GC = _read_scales(
        scale_ptr, zero_ptr, unit_ptr, offs_GC, (offs_c < C)[None, :], offs_c.shape[0] == C
    )
    q_CM = q_CM.to(tl.float32)
    folded = (q_CM[None, :, :] * scale_GC[:, :, None]).to(tl.float16)
    zero_GC = zero_GC * 2 ** (FIELD * BITS)
    return folded, tl.sum(q_CM[None, :, :] * zero_GC[:, :, None], 1)


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor, IS_WHOLE: tl.constexpr) -> tl.tensor:
    """What is there, 0 where the mask is false; nothing is asked of a mask that is all true."""
    return tl.load(pointers) if IS_WHOLE else tl.load(pointers, mask=mask, other=0)


@triton.jit
def _read_scales(
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    offs: tl.tensor,
    mask: tl.tensor,
    IS_WHOLE: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Scale and zero of groups, float32."""
    scale = _load(scale_ptr + offs, mask, IS_WHOLE)
    zero = _load(zero_ptr + offs, mask, IS_WHOLE)
    if scale.dtype == tl.uint8:
        step = (scale.to(tl.uint16) << 5).to(tl.float16, bitcast=True).to(tl.float32)
        step = step * tl.load(unit_ptr)
        zeros = step * zero.to(tl.float32)
    else:
        step = scale.to(tl.float32)
        zeros = zero.to(tl.float32)
    return step, zeros


@triton.jit
def _halves(x_ESM: tl.tensor) -> tuple[tl.tensor, ...]:
    """The first and the second half of S."""
    E: tl.constexpr = x_ESM.shape[0]
    S: tl.constexpr = x_ESM.shape[1]
    M: tl.constexpr = x_ESM.shape[2]
    first, second = tl.split(x_ESM.reshape(E, 2, S // 2, M).permute(0, 2, 3, 1))
    return first, second
