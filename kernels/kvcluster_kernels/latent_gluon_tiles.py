"""What the latent decode kernel for Hopper does with one block.

Shape letters: those of `latent_gluon.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from kvcluster_kernels.latent_gluon_layouts import (
    byte_of_place,
    codes_tile,
    copied,
    latents_first,
    operand,
    scale_line,
    sums,
)
from kvcluster_kernels.latent_turns import cos_and_sin, rotated_keys
from kvcluster_kernels.packed_gluon_layouts import FLAT

SLOTS = gl.constexpr(3)
"""Blocks whose scales are there or under way."""
# Renamed after Triton 3.6.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def append(items, item):
    """The tuple and one more."""
    return items + (item,)  # noqa: RUF005


@gluon.jit
def load_up(up_ptr, RANK: gl.constexpr, PAIRS: gl.constexpr, PIECE: gl.constexpr):
    """Rows of a head's `up` in shared memory, a tile for each field of each piece of codes."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    place = gl.arange(0, PIECE, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 2 * PAIRS, gl.SliceLayout(0, LAYOUT))
    column = column // PAIRS * (RANK * PAIRS) + column % PAIRS
    tiles = ()
    for piece in gl.static_range(RANK // 2 // PIECE):
        for field in gl.static_range(2):
            channel = field * (RANK // 2) + piece * PIECE + byte_of_place(place, PIECE)
            up = gl.load(up_ptr + channel[:, None] * PAIRS + column[None, :])
            tiles = append(
                tiles, gl.allocate_shared_memory(gl.float16, [PIECE, 2 * PAIRS], SHARED, up)
            )
    return tiles


@gluon.jit
def load_queries(
    q_ptr, channels_ptr, first_line, num_kv_heads, rows_M, NUM_ROWS: gl.constexpr,
    GROUP: gl.constexpr, DIM: gl.constexpr, PAIRS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """As `latent_tiles.load_query_pairs`, [M, E]."""
    lines_M = first_line + rows_M // GROUP * num_kv_heads * GROUP + rows_M % GROUP
    offs_e = gl.arange(0, PAIRS, gl.SliceLayout(0, LAYOUT))
    first_E = gl.load(channels_ptr + offs_e)
    second_E = gl.load(channels_ptr + PAIRS + offs_e)
    mask_ME = (rows_M < NUM_ROWS)[:, None] & (first_E >= 0)[None, :]
    line_ptr = q_ptr + (lines_M * DIM)[:, None]
    first_ME = gl.load(line_ptr + first_E[None, :], mask=mask_ME, other=0.0).to(gl.float32)
    second_ME = gl.load(line_ptr + second_E[None, :], mask=mask_ME, other=0.0).to(gl.float32)
    largest_M = gl.max(gl.maximum(gl.abs(first_ME), gl.abs(second_ME)), 1)
    exponent_M = gl.ceil(gl.log2(gl.where(largest_M > 0, largest_M, 1.0)))
    shrink_M = gl.exp2(-exponent_M)
    return first_ME * shrink_M[:, None], second_ME * shrink_M[:, None], gl.exp2(exponent_M)


@gluon.jit
def turn_queries(first_smem, second_smem, first_ME, second_ME, angle_E):
    """Pairs turned back by their angle, where all warps find them."""
    cos_E, sin_E = cos_and_sin(angle_E, True)  # noqa: FBT003
    cos_E = cos_E[None, :]
    sin_E = sin_E[None, :]
    first_smem.store((first_ME * cos_E + second_ME * sin_E).to(gl.float16))
    second_smem.store((second_ME * cos_E - first_ME * sin_E).to(gl.float16))


@gluon.jit
def _numbers(words, s0, s1, z0, z1, t0, t1, y0, y1):
    """zero + scale * code of the low and the high codes of the four bytes of each word, float16,
    rounded once. Scales and zero-points are words of two: of the low codes, then of the high ones.

    A code in the low bits of the float16 of 1024, or in the next four of that of 64, is so much
    more than itself.
    """
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 a, b, c, d, k, l;
          mov.b32 k, 0x64006400;
          mov.b32 l, 0x54005400;
          prmt.b32 a, $8, 0, 0x4140;
          prmt.b32 b, $8, 0, 0x4342;
          lop3.b32 c, a, 0x00F000F0, l, 0xEA;
          lop3.b32 d, b, 0x00F000F0, l, 0xEA;
          lop3.b32 a, a, 0x000F000F, k, 0xEA;
          lop3.b32 b, b, 0x000F000F, k, 0xEA;
          sub.f16x2 a, a, k;
          sub.f16x2 b, b, k;
          sub.f16x2 c, c, l;
          sub.f16x2 d, d, l;
          fma.rn.f16x2 a, a, $9, $11;
          fma.rn.f16x2 b, b, $10, $12;
          fma.rn.f16x2 c, c, $13, $15;
          fma.rn.f16x2 d, d, $14, $16;
          mov.b32 {$0, $1}, a;
          mov.b32 {$2, $3}, b;
          mov.b32 {$4, $5}, c;
          mov.b32 {$6, $7}, d; }
        """,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r",
        [words, s0, s1, z0, z1, t0, t1, y0, y1],
        dtype=(gl.float16,) * 8,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _load_line(smem, FIRST: gl.constexpr, W: gl.constexpr):
    """The two words of scales of each word of codes, [1, W] each."""
    x = smem.slice(FIRST, 2 * W, 0).load(scale_line(W)).reshape([W, 2])
    even, odd = gl.split(x)
    ROW: gl.constexpr = gl.SliceLayout(0, codes_tile(W))
    even = gl.convert_layout(even, ROW, assert_trivial=True)[None, :]
    odd = gl.convert_layout(odd, ROW, assert_trivial=True)[None, :]
    return even, odd


@gluon.jit
def expand(
    codes, scale_smem, zero_smem, up, acc_SN, RANK: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Sums over a block's latents times `up`: a piece is made numbers while the matrix unit works
    on the one before it."""
    W: gl.constexpr = PIECE // 4
    WIDTH: gl.constexpr = acc_SN.shape[1]
    HALF: gl.constexpr = RANK // 4
    before = (acc_SN, acc_SN)
    for piece in gl.static_range(RANK // 2 // PIECE):
        s0, s1 = _load_line(scale_smem, piece * 2 * W, W)
        z0, z1 = _load_line(zero_smem, piece * 2 * W, W)
        t0, t1 = _load_line(scale_smem, HALF + piece * 2 * W, W)
        y0, y1 = _load_line(zero_smem, HALF + piece * 2 * W, W)
        n0, n1, n2, n3, n4, n5, n6, n7 = _numbers(codes[piece], s0, s1, z0, z1, t0, t1, y0, y1)
        low = latents_first(n0, n1, n2, n3, WIDTH)
        high = latents_first(n4, n5, n6, n7, WIDTH)
        acc_SN = warpgroup_mma(low, up[2 * piece], acc_SN, use_acc=piece > 0, is_async=True)
        acc_SN = warpgroup_mma(high, up[2 * piece + 1], acc_SN, is_async=True)
        if piece > 0:
            acc_SN, _, _ = warpgroup_mma_wait(2, deps=(acc_SN, before[0], before[1]))
        before = (low, high)
    acc_SN, _, _ = warpgroup_mma_wait(0, deps=(acc_SN, before[0], before[1]))
    return acc_SN


@gluon.jit
def halves(x, LAYOUT: gl.constexpr):
    """The first and the second half of the columns of x [S, 2 E]."""
    S: gl.constexpr = x.shape[0]
    E: gl.constexpr = x.shape[1] // 2
    first, second = gl.split(x.reshape([S, 2, E]).permute([0, 2, 1]))
    first = gl.convert_layout(first, LAYOUT, assert_trivial=True)
    second = gl.convert_layout(second, LAYOUT, assert_trivial=True)
    return first, second


@gluon.jit
def _visible(
    x_SM, first, start, end, position, q_positions_M, window, LAYOUT: gl.constexpr,
    HAS_POSITIONS: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Scores of the tokens from `first` on, which is at `position`: -inf of those not visible."""
    offs_s = gl.arange(0, x_SM.shape[0], gl.SliceLayout(1, LAYOUT))
    inside_S = (offs_s >= start - first) & (offs_s < end - first)
    x_SM = gl.where(inside_S[:, None], x_SM, -float("inf"))
    if HAS_POSITIONS:
        distance_SM = q_positions_M[None, :] - (position + offs_s)[:, None]
        keep_SM = distance_SM >= 0
        if HAS_WINDOW:
            keep_SM = keep_SM & (distance_SM < window)
        x_SM = gl.where(keep_SM, x_SM, -float("inf"))
    return x_SM


@gluon.jit
def query_positions(
    positions_ptr, rows_M, NUM_ROWS: gl.constexpr, GROUP: gl.constexpr,
    HAS_POSITIONS: gl.constexpr,
):  # fmt: skip
    """Of the query rows of a KV head, and the least and the most of them."""
    found = (rows_M, 0, 0)
    if HAS_POSITIONS:
        positions_M = gl.load(positions_ptr + gl.minimum(rows_M, NUM_ROWS - 1) // GROUP)
        found = (positions_M, gl.min(positions_M, 0), gl.max(positions_M, 0))
    return found


@gluon.jit
def without_hidden(
    x_SM, first, start, end, position, q_positions, window, LAYOUT: gl.constexpr,
    HAS_POSITIONS: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Scores of the tokens from `first` on, which is at `position`: -inf of those not visible. Most
    blocks have none. `q_positions`: of `query_positions`."""
    S: gl.constexpr = x_SM.shape[0]
    q_positions_M, least, most = q_positions
    is_edge = (first < start) | (first + S > end)
    if HAS_POSITIONS:
        is_edge = is_edge | (position + S - 1 > least)
        if HAS_WINDOW:
            is_edge = is_edge | (most - position >= window)
    if is_edge:
        x_SM = _visible(
            x_SM, first, start, end, position, q_positions_M, window, LAYOUT, HAS_POSITIONS,
            HAS_WINDOW,
        )  # fmt: skip
    return x_SM


@gluon.jit
def key_turns(
    frequencies_ptr, mean_ptr, S: gl.constexpr, PAIRS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Cosines and sines of a block's tokens from its first on, and the mean of both channels of
    pairs, float16."""
    offs_e = gl.arange(0, PAIRS, gl.SliceLayout(0, LAYOUT))
    offs_s = gl.arange(0, S, gl.SliceLayout(1, LAYOUT))
    frequency_E = gl.load(frequencies_ptr + offs_e)
    angle_SE = offs_s.to(gl.float32)[:, None] * frequency_E[None, :]
    cos_SE, sin_SE = cos_and_sin(angle_SE, True)  # noqa: FBT003
    mean_first_E = gl.load(mean_ptr + offs_e).to(gl.float16)
    mean_second_E = gl.load(mean_ptr + PAIRS + offs_e).to(gl.float16)
    return cos_SE.to(gl.float16), sin_SE.to(gl.float16), mean_first_E, mean_second_E


@gluon.jit
def products_of(keys_SN, turns, first_smem, second_smem, M: gl.constexpr, LAYOUT: gl.constexpr):
    """Dot products [S, M] of expanded keys, turned from their block's position on, with queries,
    turned back by it. `turns`: of `key_turns`."""
    cos_SE, sin_SE, mean_first_E, mean_second_E = turns
    first_SE, second_SE = halves(keys_SN, LAYOUT)
    first_SE, second_SE = rotated_keys(
        first_SE, second_SE, mean_first_E, mean_second_E, cos_SE, sin_SE,
        True,  # noqa: FBT003
    )  # fmt: skip
    products_SM = mma_v2(
        gl.convert_layout(first_SE, operand(0, 2), assert_trivial=True),
        first_smem.permute([1, 0]).load(operand(1, 2)),
        gl.zeros([keys_SN.shape[0], M], gl.float32, sums()),
    )
    return mma_v2(
        gl.convert_layout(second_SE, operand(0, 2), assert_trivial=True),
        second_smem.permute([1, 0]).load(operand(1, 2)),
        products_SM,
    )


@gluon.jit
def wait(place, count, NANOSECONDS: gl.constexpr):
    """For about so long where `place` is of the later half of `count`."""
    if 2 * place >= count:
        _sleep(NANOSECONDS)


@gluon.jit
def _sleep(nanoseconds):
    gl.inline_asm_elementwise(
        """
        { nanosleep.u32 $1;
          mov.b32 $0, 0; }
        """,
        "=r,r",
        [nanoseconds],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_codes(
    codes_ptr, stride, block, PAGE_BLOCKS: gl.constexpr, RANK: gl.constexpr, PIECE: gl.constexpr
):
    """A block's words of codes, [S, W] of each piece."""
    codes_ptr += (block // PAGE_BLOCKS).to(gl.int64) * stride
    codes_ptr += block % PAGE_BLOCKS * (64 * RANK // 2)
    W: gl.constexpr = PIECE // 4
    LAYOUT: gl.constexpr = codes_tile(W)
    offs_s = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    offs_w = gl.arange(0, W, gl.SliceLayout(0, LAYOUT))
    words_ptr = codes_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    places = offs_s[:, None] * (RANK // 8) + offs_w[None, :]
    codes = ()
    for piece in gl.static_range(RANK // 2 // PIECE):
        codes = append(codes, gl.load(words_ptr + places + piece * W))
    return codes


@gluon.jit
def copy_line(smem, ptr, COUNT: gl.constexpr):
    """COUNT numbers to shared memory; does not wait."""
    SIZE: gl.constexpr = smem.dtype.primitive_bitwidth // 8
    offs = gl.arange(0, smem.shape[0], copied(smem.shape[0], SIZE))
    if smem.shape[0] == COUNT:
        _copy(smem, ptr + offs)
    else:
        _copy(smem, ptr + offs, mask=offs < COUNT)


@gluon.constexpr_function
def _power_of_2(count):
    power = 1
    while power < count:
        power *= 2
    return power


@gluon.jit
def key_room(S: gl.constexpr, M: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr):
    """Shared memory for queries, the first and the second channels of pairs, for scores, and for
    the scales and zero-points of some blocks."""
    QUERIES: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    first = gl.allocate_shared_memory(gl.float16, [M, PAIRS], QUERIES)
    second = gl.allocate_shared_memory(gl.float16, [M, PAIRS], QUERIES)
    SCORES: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [0, 1])
    scores = gl.allocate_shared_memory(gl.float32, [S, M], SCORES)
    LINE: gl.constexpr = _power_of_2(RANK // 2)
    scale = gl.allocate_shared_memory(gl.int32, [SLOTS, LINE], FLAT)
    zero = gl.allocate_shared_memory(gl.int32, [SLOTS, LINE], FLAT)
    return first, second, scores, scale, zero


@gluon.jit
def start_scale_copies(scales, slot, block, PAGE_BLOCKS: gl.constexpr, RANK: gl.constexpr):
    """Copy the scales and zero-points of a block's latents, words of two; does not wait. `scales`:
    their shared memory, pointers and strides, which count numbers of 16 bits."""
    page, place = (block // PAGE_BLOCKS).to(gl.int64), block % PAGE_BLOCKS
    HALF: gl.constexpr = RANK // 2
    for plane in gl.static_range(2):
        words_ptr = scales[2 + plane].to(gl.pointer_type(gl.int32), bitcast=True)
        start = words_ptr + page * (scales[4 + plane] // 2) + place * HALF
        copy_line(scales[plane].index(slot), start, HALF)
    async_copy.commit_group()


@gluon.jit
def weights_of(
    scores_SM, factor_M, largest_scale, max_M, HEADROOM: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Weights of a block times 2^(HEADROOM less a power of two), float16, the new maximum, and what
    to multiply earlier sums with; the power is that of the largest scale of a token, or 1. Scores
    are to base 2 times `factor_M`; with softcap, they are the scores."""
    largest_M = gl.max(scores_SM, 0)
    exponent = gl.ceil(gl.log2(gl.maximum(largest_scale, 1.0)))
    if HAS_SOFTCAP:
        new_max_M = gl.maximum(max_M, largest_M + exponent)
    else:
        new_max_M = gl.maximum(max_M, largest_M * factor_M + exponent)
    # Where nothing is visible yet, -inf minus -inf would be NaN.
    shift_M = gl.where(new_max_M == -float("inf"), 0.0, new_max_M)
    lowered_M = shift_M - HEADROOM
    if HAS_SOFTCAP:
        weights_SM = gl.exp2(scores_SM - lowered_M[None, :])
    else:
        weights_SM = gl.exp2(scores_SM * factor_M[None, :] - lowered_M[None, :])
    return weights_SM.to(gl.float16), new_max_M, gl.exp2(max_M - shift_M)
