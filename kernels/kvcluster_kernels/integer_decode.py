"""Decode over a paged cache of integers: keys per channel, values per token, as they are stored.

    score_t  = sum_d (q_d scale_d) code_td + sum_d q_d zero_d
    output_d = sum_t (p_t scale_t) code_td + sum_t p_t zero_t

Scale and zero of keys fold into the queries once for a group of tokens, those of values into the
weights once for a group of channels; the codes themselves are only masked (`codes.py`). Tokens and
channels are the rows of the products, the few query rows of a KV head their columns, eight of
which fill an instruction where rows would be padded to sixteen.

Weights go into float16, which has few exponents. So the maximum that is taken from the scores is
that of score + log2(largest scale of the block's values), and the largest product of a weight and
a scale is about 2^15.

A block is worked on in parts, as many as a byte of values has fields, or keys have groups: the
weights of a part meet one field of the values as they are, so that nothing is rearranged. Nothing
in the loop is less than four bytes a thread, so that all of it is copied ahead.

`packed_plain.decode_integers` is the definition. Shape letters: those of `paging.py`; S tokens of
a block, G groups of keys (each S / G tokens), E groups of values (each D / E channels).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.codes import CODE_UNIT, has_assembly, num_fields, row_bytes
from kvcluster_kernels.combine import combine
from kvcluster_kernels.integer_tiles import (
    HEADROOM,
    key_unit,
    load_query_fields,
    score_block,
    sum_weights,
    value_exponent,
    weigh_block,
    zero_sums,
)
from kvcluster_kernels.packed_gluon_launch import Codes, Planes, pointers, reason_against
from kvcluster_kernels.packed_gluon_launch import splits as hopper_splits
from kvcluster_kernels.packed_launch import page_strides, plan_launch
from kvcluster_kernels.paging import (
    ROW_NUMBERS,
    ROW_POINTERS,
    Attention,
    DecodeSettings,
    PagedRows,
    Partial,
    SplitPartials,
    let_next_start,
    load_query_positions,
    overlaps,
    split_tiles,
    wait_for_earlier,
)
from kvcluster_kernels.softmax import append, column_weights, store_columns

BITS = (8, 4, 3, 2)
"""The code widths of these kernels."""
_LEAST_BYTES = 16
"""Of a row of codes: a matrix product is of 16 numbers at least."""
_LEAST_TOKENS = 16
"""Of a group of keys, likewise."""


class IntegerPages(NamedTuple):
    """Pages of one array, keys or values, as `[pages, blocks of a page, ...]`. Axes R, C are
    tokens, channels for keys and channels, tokens for values; codes are packed along C."""

    codes: Tensor
    """[P, N, K, R, C * bits / 8], uint8, or int8 where codes have 8 bits."""
    scale: Tensor
    """[P, N, K, groups of R, C], float16, or uint8 with 8 scale bits."""
    zero: Tensor
    """The same, float16 or int8."""
    unit: Tensor | None = None
    """[P, N, K], float32, with 8 scale bits."""
    high: Tensor | None = None
    """Of codes of 3 bits the third, [P, N, K, R, C / 8], uint8; `codes` has the lower two."""

    @property
    def planes(self) -> Planes:
        """In the order of the kernel for Hopper."""
        return Planes(self.codes, self.high, self.scale, self.zero, self.unit)


def decode_integers(
    q_RTHD: Tensor,
    keys: IntegerPages,
    values: IntegerPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> Partial:
    """Attention of each row's query tokens over its encoded blocks. Blocks are whole: a row's
    `starts` and `ends` only say which of their tokens are read.

    Raises: ValueError for arrays that do not go together.
    """
    splits = integer_splits(q_RTHD, keys, values, rows, attention, settings)
    return combine(splits, num_tokens=q_RTHD.shape[1])


def integer_splits(
    q_RTHD: Tensor,
    keys: IntegerPages,
    values: IntegerPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
    *,
    begins_early: bool = False,
) -> SplitPartials:
    """The same before it is merged, to be merged with more. `begins_early`: beside the kernel
    launched before, `decode.decode_splits` or another of these, none of whose results it reads;
    it ends after that one. The queries are what that one read, written before it."""
    codes = codes_of(q_RTHD, keys, values)
    against = reason_against(q_RTHD, keys.planes, values.planes, codes, attention)
    if against is None and not (settings and settings.is_portable):
        return hopper_splits(
            *(q_RTHD, keys.planes, values.planes, codes, rows, attention, settings),
            begins_early=begins_early,
        )
    num_kv_heads, block_size = keys.codes.shape[2:4]
    dim_v = values.codes.shape[3]
    chosen = settings or default_settings(q_RTHD, num_kv_heads, max(codes.k_bits, codes.v_bits))
    launch = plan_launch(q_RTHD, rows, attention, chosen, num_kv_heads=num_kv_heads, dim_v=dim_v)
    early = begins_early and overlaps(q_RTHD.device)
    _integer_kernel[launch.grid](
        q_RTHD,
        *pointers(keys.planes),
        *pointers(values.planes),
        *launch.arguments,
        *page_strides(keys.planes),
        *page_strides(values.planes),
        **launch.constants,
        BLOCK_SIZE=block_size,
        PAGE_BLOCKS=keys.codes.shape[1],
        DIM_K=q_RTHD.shape[3],
        DIM_V=dim_v,
        K_BITS=codes.k_bits,
        V_BITS=codes.v_bits,
        K_GROUPS=codes.k_groups,
        V_GROUPS=codes.v_groups,
        SCALE_BITS=16 if keys.unit is None else 8,
        IS_GPU=has_assembly(_integer_kernel),
        BEGINS_EARLY=early,
        launch_pdl=early,
    )
    return launch.found


def codes_of(q_RTHD: Tensor, keys: IntegerPages, values: IntegerPages) -> Codes:
    """Raises: ValueError for arrays that no kernel reads."""
    block_size = keys.codes.shape[3]
    k_bits, v_bits = code_bits(keys, q_RTHD.shape[3]), code_bits(values, block_size)
    if (keys.unit is None) != (values.unit is None):
        raise ValueError("keys and values want scales of the same number of bits")
    if min(keys.codes.shape[4], values.codes.shape[4]) < _LEAST_BYTES:
        raise ValueError(
            f"{k_bits} and {v_bits} bits want heads of {_LEAST_BYTES * 8 // k_bits} channels and "
            f"blocks of {_LEAST_BYTES * 8 // v_bits} tokens or more"
        )
    if block_size // keys.scale.shape[3] < _LEAST_TOKENS:
        raise ValueError(f"keys want groups of {_LEAST_TOKENS} tokens or more")
    return Codes(k_bits, v_bits, keys.scale.shape[3], values.scale.shape[3])


def default_settings(q_RTHD: Tensor, num_kv_heads: int, bits: int) -> DecodeSettings:
    """As many programs as a processor has registers for. One warp a program needs no barrier, as
    long as what it unpacks fits its registers.

    Of 8 bits and 16 or 32 columns, Triton 3.6 makes programs of four warps that multiply values
    with what is not there: they give NaN (measured)."""
    num_rows = q_RTHD.shape[1] * q_RTHD.shape[2] // num_kv_heads
    if bits == 8 and 8 < num_rows <= 32:
        return DecodeSettings(num_warps=2, programs_per_processor=4, columns=16)
    if num_rows > 8:
        columns = 64 if bits == 8 else 32
        return DecodeSettings(num_warps=4, programs_per_processor=2, columns=columns)
    if bits == 4:
        return DecodeSettings(num_warps=1, programs_per_processor=8)
    return DecodeSettings(num_warps=2, programs_per_processor=5 if bits == 8 else 4)


def code_bits(pages: IntegerPages, contiguous: int) -> int:
    """Of an array whose codes are packed along an axis of this length. Raises: ValueError."""
    bits, rest = divmod(8 * pages.codes.shape[4], contiguous)
    if rest or bits not in BITS:
        raise ValueError(f"{pages.codes.shape[4]} bytes of {contiguous} codes: want bits in {BITS}")
    return bits if pages.high is None else bits + 1


@triton.jit(do_not_specialize=ROW_NUMBERS, do_not_specialize_on_alignment=ROW_POINTERS)
def _integer_kernel(
    q_ptr: tl.tensor,
    k_codes_ptr: tl.tensor,
    k_high_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    k_zero_ptr: tl.tensor,
    k_unit_ptr: tl.tensor,
    v_codes_ptr: tl.tensor,
    v_high_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    v_zero_ptr: tl.tensor,
    v_unit_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    block_positions_ptr: tl.tensor,
    q_positions_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    max_blocks: tl.tensor,
    num_splits: tl.tensor,
    stride_k_codes: tl.tensor,
    stride_k_high: tl.tensor,
    stride_k_scale: tl.tensor,
    stride_k_zero: tl.tensor,
    stride_k_unit: tl.tensor,
    stride_v_codes: tl.tensor,
    stride_v_high: tl.tensor,
    stride_v_scale: tl.tensor,
    stride_v_zero: tl.tensor,
    stride_v_unit: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
    IS_GPU: tl.constexpr,
    BEGINS_EARLY: tl.constexpr,
) -> None:
    K_BYTES: tl.constexpr = row_bytes(DIM_K, K_BITS)
    V_BYTES: tl.constexpr = row_bytes(BLOCK_SIZE, V_BITS)
    # Parts of a block that share scales of keys, and a field of the bytes of values.
    PARTS: tl.constexpr = max(num_fields(V_BITS), K_GROUPS)
    CHANNELS: tl.constexpr = DIM_V // V_GROUPS
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(CHANNELS))
    ROW_TILES: tl.constexpr = triton.cdiv(NUM_ROWS, BLOCK_M)
    let_next_start(OVERLAPS)
    split, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    rows_M = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head, num_kv_heads, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, BLOCK_SIZE)
    q_fields, size_M = load_query_fields(
        q_ptr, row, head, num_kv_heads, rows_M, NUM_ROWS, GROUP, DIM_K, K_BITS, IS_SCALED=True
    )
    q_positions_M = load_query_positions(
        q_positions_ptr, row, rows_M, NUM_ROWS, GROUP, HAS_POSITIONS
    )
    blocks_ptr += row.to(tl.int64) * max_blocks
    block_positions_ptr += row.to(tl.int64) * max_blocks

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_NM = zero_sums(BLOCK_M)
    acc = ()
    zeros = ()
    for _ in tl.static_range(V_GROUPS):
        acc = append(acc, tl.zeros([BLOCK_D, BLOCK_M], tl.float32))
        zeros = append(zeros, zero_sums(BLOCK_M))
    for tile in tl.range(begin, stop):
        block = tl.load(blocks_ptr + tile)
        page = (block // PAGE_BLOCKS).to(tl.int64)
        place = block % PAGE_BLOCKS * num_kv_heads + head
        k_codes = k_codes_ptr + page * stride_k_codes + place * (BLOCK_SIZE * K_BYTES)
        k_high = k_high_ptr + page * stride_k_high + place * (BLOCK_SIZE * K_BYTES // 2)
        k_scale = k_scale_ptr + page * stride_k_scale + place * (K_GROUPS * DIM_K)
        k_zero = k_zero_ptr + page * stride_k_zero + place * (K_GROUPS * DIM_K)
        k_unit = key_unit(k_unit_ptr + page * stride_k_unit + place, SCALE_BITS)
        position = tl.load(block_positions_ptr + tile) if HAS_POSITIONS else tile
        scores = score_block(
            k_codes, k_high, k_scale, k_zero, q_fields, scale * k_unit * size_M, softcap,
            tile * BLOCK_SIZE, start, end, position, q_positions_M, window,
            BLOCK_SIZE, PARTS, DIM_K, K_BITS, K_GROUPS,
            HAS_POSITIONS, HAS_SOFTCAP, HAS_WINDOW, IS_GPU,
        )  # fmt: skip
        v_scale = v_scale_ptr + page * stride_v_scale + place * (V_GROUPS * BLOCK_SIZE)
        v_zero = v_zero_ptr + page * stride_v_zero + place * (V_GROUPS * BLOCK_SIZE)
        v_unit = v_unit_ptr + page * stride_v_unit + place
        exponent = value_exponent(v_scale, v_unit, BLOCK_SIZE, V_GROUPS, SCALE_BITS)
        weights, max_M, decay_M = column_weights(scores, exponent, HEADROOM, max_M)
        sum_NM = sum_NM * decay_M[None, :] + sum_weights(weights, IS_GPU) * tl.math.exp2(-exponent)
        v_codes = v_codes_ptr + page * stride_v_codes + place * (DIM_V * V_BYTES)
        v_high = v_high_ptr + page * stride_v_high + place * (DIM_V * V_BYTES // 2)
        acc, zeros = weigh_block(
            v_codes, v_high, v_scale, v_zero, weights, exponent, decay_M, acc, zeros,
            CHANNELS, BLOCK_SIZE, V_BITS, IS_GPU,
        )  # fmt: skip
    wait_for_earlier(BEGINS_EARLY)
    first_row = ((row * num_kv_heads + head) * num_splits + split) * NUM_ROWS
    sum_M = tl.max(sum_NM, 0)
    for group in tl.static_range(V_GROUPS):
        out_DM = acc[group] * CODE_UNIT + tl.max(zeros[group], 0)[None, :]
        store_columns(
            out_ptr, lse_ptr, out_DM, max_M - HEADROOM, sum_M, first_row, rows_M,
            NUM_ROWS, DIM_V, group * CHANNELS, CHANNELS,
        )  # fmt: skip
