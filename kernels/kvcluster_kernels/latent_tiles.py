"""What kernels do with one block of latents: keys, and weighted sums of values.

Shape letters: those of `latent_pages.py`; M query rows of a KV head, P numbers of a piece.
"""

import triton
import triton.language as tl

from kvcluster_kernels.codes import dot, num_fields
from kvcluster_kernels.latent_codes import (
    load_grid,
    load_numbers,
    load_unit,
    numbers,
    numbers3,
)
from kvcluster_kernels.latent_pages import (
    first_number,
    form_count,
    form_fields,
    form_grid,
    form_piece,
    num_arrays,
)
from kvcluster_kernels.softmax import append


@triton.jit
def load_query_pairs(
    q_ptr: tl.tensor,
    channels_ptr: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    num_kv_heads: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Query rows as columns, the first and the second channels of pairs, float32 [E, M], and the
    power of two, [M], that they were divided by, so that none is above 1."""
    tokens_M = row * (NUM_ROWS // GROUP) + rows_M // GROUP
    places_M = ((tokens_M * num_kv_heads + head) * GROUP + rows_M % GROUP) * DIM
    offs_e = tl.arange(0, PAIRS)
    first_E = tl.load(channels_ptr + offs_e)
    second_E = tl.load(channels_ptr + PAIRS + offs_e)
    mask_EM = (first_E >= 0)[:, None] & (rows_M < NUM_ROWS)[None, :]
    first_EM = tl.load(q_ptr + places_M[None, :] + first_E[:, None], mask=mask_EM, other=0.0)
    second_EM = tl.load(q_ptr + places_M[None, :] + second_E[:, None], mask=mask_EM, other=0.0)
    first_EM = first_EM.to(tl.float32)
    second_EM = second_EM.to(tl.float32)
    largest_M = tl.max(tl.maximum(tl.abs(first_EM), tl.abs(second_EM)), 0)
    exponent_M = tl.math.ceil(tl.math.log2(tl.where(largest_M > 0, largest_M, 1.0)))
    shrink_M = tl.math.exp2(-exponent_M)
    size_M = tl.math.exp2(exponent_M)
    return first_EM * shrink_M[None, :], second_EM * shrink_M[None, :], size_M


@triton.jit
def load_up(
    up_ptr: tl.tensor, FORMS: tl.constexpr, RANK: tl.constexpr, PAIRS: tl.constexpr
) -> tl.tuple:
    """The rows of a head's `up` in the order in which `expand` meets latents: piece after piece of
    the codes of each section, and of each its fields, [P, 2 E]: the first channels of all pairs,
    then the second ones."""
    rows = ()
    for section in tl.static_range(len(FORMS)):
        rows = _section_up(rows, up_ptr, FORMS, section, RANK, PAIRS)
    return rows


@triton.jit
def _section_up(
    rows: tl.tuple,
    up_ptr: tl.tensor,
    FORMS: tl.constexpr,
    SECTION: tl.constexpr,
    RANK: tl.constexpr,
    PAIRS: tl.constexpr,
) -> tl.tuple:
    P: tl.constexpr = form_piece(FORMS, SECTION)
    FIELDS: tl.constexpr = form_fields(FORMS, SECTION)
    COUNT: tl.constexpr = form_count(FORMS, SECTION)
    offs_p = tl.arange(0, P)
    offs_n = tl.arange(0, 2 * PAIRS)
    columns_N = offs_n // PAIRS * (RANK * PAIRS) + offs_n % PAIRS
    for piece in tl.static_range(triton.cdiv(COUNT, P)):
        for field in tl.static_range(FIELDS):
            inside_P = piece * P + offs_p < COUNT
            places_P = first_number(FORMS, SECTION) + field * COUNT + piece * P + offs_p
            up_PN = tl.load(
                up_ptr + places_P[:, None] * PAIRS + columns_N[None, :],
                mask=inside_P[:, None],
                other=0.0,
            )
            rows = append(rows, up_PN)
    return rows


@triton.jit
def block_planes(
    planes: tl.tuple,
    strides: tl.tuple,
    page: tl.tensor,
    place: tl.tensor,
    S: tl.constexpr,
    FORMS: tl.constexpr,
) -> tl.tuple:
    """Where one block's part of each plane of each section begins."""
    found = ()
    for section in tl.static_range(len(FORMS)):
        at = plane_pointers(
            planes[section], strides[section], page, place,
            S * form_count(FORMS, section), form_grid(FORMS, section, S),
        )  # fmt: skip
        found = append(found, at)
    return found


@triton.jit
def plane_pointers(
    planes: tl.tuple,
    strides: tl.tuple,
    page: tl.tensor,
    place: tl.tensor,
    SIZE: tl.constexpr,
    GRID: tl.constexpr,
) -> tl.tuple:
    """Codes, third bits, scales, zero-points and unit of one block, whose codes are SIZE bytes (or
    numbers) and whose scales are GRID."""
    return (
        planes[0] + page * strides[0] + place * SIZE,
        planes[1] + page * strides[1] + place * (SIZE // 2),
        planes[2] + page * strides[2] + place * GRID,
        planes[3] + page * strides[3] + place * GRID,
        planes[4] + page * strides[4] + place,
    )


@triton.jit
def expand(
    blocks: tl.tuple,
    up: tl.tuple,
    S: tl.constexpr,
    FORMS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What `load_up` makes of a block's latents: first and second channels, float32 [S, E]."""
    acc_SN = tl.zeros([S, up[0].shape[1]], tl.float32)
    for section in tl.static_range(len(FORMS)):
        acc_SN = _expand_section(blocks[section], up, acc_SN, S, FORMS, section, IS_GPU)
    # A thread has the same column of both halves, so that nothing moves.
    halves = acc_SN.reshape(S, 2, up[0].shape[1] // 2).permute(0, 2, 1)
    first_SE, second_SE = tl.split(halves)
    return first_SE, second_SE


@triton.jit
def _expand_section(
    block: tl.tuple,
    up: tl.tuple,
    acc_SN: tl.tensor,
    S: tl.constexpr,
    FORMS: tl.constexpr,
    SECTION: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tensor:
    P: tl.constexpr = form_piece(FORMS, SECTION)
    FIELDS: tl.constexpr = form_fields(FORMS, SECTION)
    BEFORE: tl.constexpr = num_arrays(FORMS, SECTION)
    unit = load_unit(block, FORMS, SECTION)
    for piece in tl.static_range(triton.cdiv(form_count(FORMS, SECTION), P)):
        fields = load_numbers(block, unit, piece * P, S, FORMS, SECTION, IS_GPU)
        for field in tl.static_range(FIELDS):
            acc_SN = dot(fields[field], up[BEFORE + piece * FIELDS + field], acc_SN, IS_GPU)
    return acc_SN


@triton.jit
def weigh_latents(
    blocks: tl.tuple,
    weights_SM: tl.tensor,
    decay_M: tl.tensor,
    acc: tl.tuple,
    FORMS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    """Weighted sums of a block's numbers added to earlier ones times their decay: piece after
    piece of the codes of each section, and of each its fields, [M, P]. Tokens are rows of the
    numbers, so that weights are what is transposed."""
    weights_MS = tl.trans(weights_SM)
    found = ()
    for section in tl.static_range(len(FORMS)):
        found = _weigh_section(
            found, blocks[section], weights_MS, decay_M, acc, FORMS, section, IS_GPU
        )
    return found


@triton.jit
def _weigh_section(
    found: tl.tuple,
    block: tl.tuple,
    weights_MS: tl.tensor,
    decay_M: tl.tensor,
    acc: tl.tuple,
    FORMS: tl.constexpr,
    SECTION: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    S: tl.constexpr = weights_MS.shape[1]
    P: tl.constexpr = form_piece(FORMS, SECTION)
    FIELDS: tl.constexpr = form_fields(FORMS, SECTION)
    BEFORE: tl.constexpr = num_arrays(FORMS, SECTION)
    unit = load_unit(block, FORMS, SECTION)
    for piece in tl.static_range(triton.cdiv(form_count(FORMS, SECTION), P)):
        fields = load_numbers(block, unit, piece * P, S, FORMS, SECTION, IS_GPU)
        for field in tl.static_range(FIELDS):
            number_SP = fields[field]
            acc_MP = acc[BEFORE + piece * FIELDS + field] * decay_M[:, None]
            found = append(found, dot(weights_MS.to(number_SP.dtype), number_SP, acc_MP, IS_GPU))
    return found


@triton.jit
def weigh_integers(
    block: tl.tuple,
    weights: tl.tuple,
    decay_M: tl.tensor,
    acc: tl.tuple,
    CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    """The same of integers with scales for each token and group of CHANNELS, one array [D, M] for
    each group. `weights` are those of each field of a byte, [P, M]."""
    FIELDS: tl.constexpr = num_fields(BITS)
    P: tl.constexpr = BLOCK_SIZE // FIELDS
    offs_d = tl.arange(0, acc[0].shape[0])
    offs_p = tl.arange(0, P)
    mask_DP = (offs_d < CHANNELS)[:, None] & (offs_p < P)[None, :]
    unit = tl.load(block[4]) if SCALE_BITS == 8 else 1.0
    found = ()
    for group in tl.static_range(len(acc)):
        rows_D = group * CHANNELS + offs_d
        packed_DP = tl.load(block[0] + rows_D[:, None] * P + offs_p[None, :], mask=mask_DP, other=0)
        scales = ()
        zeros = ()
        for field in tl.static_range(FIELDS):
            scale, zero = load_grid(
                block[2] + group * BLOCK_SIZE + field * P,
                block[3] + group * BLOCK_SIZE + field * P,
                unit, offs_d, offs_p, P, P, P, 1, SCALE_BITS,
            )  # fmt: skip
            scales = append(scales, scale)
            zeros = append(zeros, zero)
        if BITS == 3:
            fields = numbers3(packed_DP, block[1], rows_D, offs_p, P, scales, zeros, IS_GPU)
        else:
            fields = numbers(packed_DP, scales, zeros, BITS, IS_GPU)
        acc_DM = acc[group] * decay_M[None, :]
        for field in tl.static_range(FIELDS):
            acc_DM = dot(fields[field], weights[field], acc_DM, IS_GPU)
        found = append(found, acc_DM)
    return found
