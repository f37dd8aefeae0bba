"""Decode over latents of 4 bits beside low-bit values for Hopper in Gluon, with what Triton's
compiler would decide decided here. What it computes is `latent_decode.py`'s.

A program is one warp group with the way back of one KV head in shared memory. A token's codes go
from memory into the registers that multiply them, a block ahead. Pieces of them are made numbers
while the matrix unit expands the piece before, and two programs share a processor, so that one's
softmax runs beside another's expansion. Warps tell each other scores alone, once a block: each
weighs all tokens of a block, for its own channels of the values.

Shape letters: those of `latent_pages.py`; M query rows of a KV head, W words of codes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from kvcluster_kernels.codes import num_fields
from kvcluster_kernels.latent_gluon_layouts import (
    expanded,
    sums,
    turned,
    weighed,
)
from kvcluster_kernels.latent_gluon_tiles import (
    SLOTS,
    expand,
    key_room,
    key_turns,
    load_codes,
    load_queries,
    load_up,
    products_of,
    query_positions,
    start_scale_copies,
    turn_queries,
    wait,
    weights_of,
    without_hidden,
)
from kvcluster_kernels.latent_gluon_values import (
    largest_scale,
    no_sums,
    start_value_copies,
    store_values,
    value_room,
    weigh_values,
)
from kvcluster_kernels.paging import ROW_NUMBERS, ROW_POINTERS, let_next_start, split_tiles
from kvcluster_kernels.softmax import to_base_2

HEADROOM = gl.constexpr(15.0)
"""As `latent_values.HEADROOM`."""
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit(do_not_specialize=ROW_NUMBERS, do_not_specialize_on_alignment=ROW_POINTERS)
def latent_kernel(
    q_ptr, up_ptr, mean_ptr, channels_ptr, frequencies_ptr,
    k_codes_ptr, k_scale_ptr, k_zero_ptr, v_codes_ptr, v_high_ptr, v_scale_ptr, v_zero_ptr,
    blocks_ptr, starts_ptr, ends_ptr, block_positions_ptr, q_positions_ptr, out_ptr, lse_ptr,
    scale, softcap, window, max_blocks, num_splits,
    stride_k_codes, stride_k_scale, stride_k_zero, stride_v_codes, stride_v_high, stride_v_scale,
    stride_v_zero,
    NUM_ROWS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_POSITIONS: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_WINDOW: gl.constexpr,
    OVERLAPS: gl.constexpr, BLOCK_SIZE: gl.constexpr, PAGE_BLOCKS: gl.constexpr,
    DIM: gl.constexpr, PAIRS: gl.constexpr, RANK: gl.constexpr, PIECE: gl.constexpr,
    DIM_V: gl.constexpr, V_BITS: gl.constexpr, V_GROUPS: gl.constexpr, IS_ROTATED: gl.constexpr,
    LATE_NS: gl.constexpr,
):  # fmt: skip
    """Arguments as of `latent_decode._latent_kernel`. Scales are words of two."""
    let_next_start(OVERLAPS)
    gl.static_assert(BLOCK_SIZE == 64)
    WEIGHED: gl.constexpr = weighed(BLOCK_M, num_fields(V_BITS))
    TOKENS: gl.constexpr = gl.SliceLayout(1, WEIGHED)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, WEIGHED)
    TURNED: gl.constexpr = turned(PAIRS)
    KEYS: gl.constexpr = expanded(PAIRS)
    ROW_TILES: gl.constexpr = (NUM_ROWS + BLOCK_M - 1) // BLOCK_M
    split, row_tile = gl.program_id(0) // ROW_TILES, gl.program_id(0) % ROW_TILES
    head, num_kv_heads, row = gl.program_id(1), gl.num_programs(1), gl.program_id(2)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, BLOCK_SIZE)
    last = gl.maximum(stop - 1, begin)
    blocks_ptr += row.to(gl.int64) * max_blocks
    block_positions_ptr += row.to(gl.int64) * max_blocks
    # Shared memory: the way back, queries, scores, and some blocks' scales and values.
    up = load_up(up_ptr + head * (2 * RANK * PAIRS), RANK, PAIRS, PIECE)
    first_smem, second_smem, scores_smem, k_scale_smem, k_zero_smem = key_room(
        BLOCK_SIZE, BLOCK_M, PAIRS, RANK
    )
    v_room = value_room(v_codes_ptr, v_high_ptr, BLOCK_SIZE, DIM_V, V_BITS, V_GROUPS, IS_ROTATED)
    v_planes = (
        v_codes_ptr, v_high_ptr, v_scale_ptr, v_zero_ptr,
        stride_v_codes, stride_v_high, stride_v_scale, stride_v_zero,
    )  # fmt: skip
    block = gl.load(blocks_ptr + begin, mask=stop > begin, other=0)
    position = gl.load(block_positions_ptr + begin, mask=stop > begin, other=0)
    after = gl.minimum(begin + 1, last)
    next_block = gl.load(blocks_ptr + after, mask=stop > begin, other=0)
    next_position = gl.load(block_positions_ptr + after, mask=stop > begin, other=0)
    third_block = gl.load(blocks_ptr + gl.minimum(begin + 2, last), mask=stop > begin, other=0)
    k_scales = (k_scale_smem, k_zero_smem, k_scale_ptr, k_zero_ptr, stride_k_scale, stride_k_zero)
    codes = load_codes(k_codes_ptr, stride_k_codes, block, PAGE_BLOCKS, RANK, PIECE)
    start_scale_copies(k_scales, 0, block, PAGE_BLOCKS, RANK)
    start_value_copies(
        v_room, 0, v_planes, block, head, num_kv_heads, PAGE_BLOCKS, V_BITS, IS_ROTATED
    )
    start_scale_copies(k_scales, 1, next_block, PAGE_BLOCKS, RANK)
    rows_M = row_tile * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TURNED))
    first_line = (row * (NUM_ROWS // GROUP) * num_kv_heads + head) * GROUP
    q_first_ME, q_second_ME, size_M = load_queries(
        q_ptr, channels_ptr, first_line, num_kv_heads, rows_M, NUM_ROWS, GROUP, DIM, PAIRS, TURNED
    )
    factor_M = gl.convert_layout(size_M, COLUMNS) * (scale if HAS_SOFTCAP else scale * LOG2_E)
    frequency_E = gl.load(frequencies_ptr + gl.arange(0, PAIRS, gl.SliceLayout(0, TURNED)))
    turn_queries(
        first_smem, second_smem, q_first_ME, q_second_ME, position.to(gl.float32) * frequency_E
    )
    q_positions = query_positions(
        q_positions_ptr + row * (NUM_ROWS // GROUP),
        row_tile * BLOCK_M + gl.arange(0, BLOCK_M, COLUMNS), NUM_ROWS, GROUP, HAS_POSITIONS,
    )  # fmt: skip
    turns = key_turns(frequencies_ptr, mean_ptr + head * (2 * PAIRS), BLOCK_SIZE, PAIRS, KEYS)

    max_M = gl.full([BLOCK_M], -float("inf"), gl.float32, COLUMNS)
    found = no_sums(DIM_V, BLOCK_M, V_GROUPS)
    zeros_SN = gl.zeros([BLOCK_SIZE, 2 * PAIRS], gl.float32, expanded(2 * PAIRS))
    fence_async_shared()
    if LATE_NS > 0:
        wait(row * num_kv_heads + head, gl.num_programs(2) * num_kv_heads, LATE_NS)
    slot = 0
    k_slot = 0
    for tile in range(begin, stop):
        # Of what is under way, the next block's scales may be.
        async_copy.wait_group(1)
        start_value_copies(
            v_room,
            1 - slot,
            v_planes,
            next_block,
            head,
            num_kv_heads,
            PAGE_BLOCKS,
            V_BITS,
            IS_ROTATED,
        )
        keys_SN = expand(
            codes, k_scale_smem.index(k_slot), k_zero_smem.index(k_slot), up, zeros_SN, RANK, PIECE
        )
        codes = load_codes(k_codes_ptr, stride_k_codes, next_block, PAGE_BLOCKS, RANK, PIECE)
        angle_E = next_position.to(gl.float32) * frequency_E
        this_position = position
        position = next_position
        next_position = gl.load(block_positions_ptr + gl.minimum(tile + 2, last))

        scores_smem.store(products_of(keys_SN, turns, first_smem, second_smem, BLOCK_M, KEYS))
        scores_SM = scores_smem.load(WEIGHED)
        # All warps have read this block's queries and scales.
        turn_queries(first_smem, second_smem, q_first_ME, q_second_ME, angle_E)
        k_ahead = gl.where(k_slot == 0, SLOTS - 1, k_slot - 1)
        start_scale_copies(k_scales, k_ahead, third_block, PAGE_BLOCKS, RANK)
        k_slot = gl.where(k_slot == SLOTS - 1, 0, k_slot + 1)
        next_block = third_block
        third_block = gl.load(blocks_ptr + gl.minimum(tile + 3, last))

        if HAS_SOFTCAP:
            scores_SM = to_base_2(scores_SM, factor_M[None, :], softcap, HAS_SOFTCAP)
        scores_SM = without_hidden(
            scores_SM, tile * BLOCK_SIZE, start, end, this_position, q_positions, window, WEIGHED,
            HAS_POSITIONS, HAS_WINDOW,
        )  # fmt: skip
        largest = largest_scale(v_room, slot, V_GROUPS, TOKENS)
        weights_SM, max_M, decay_M = weights_of(
            scores_SM, factor_M, largest, max_M, HEADROOM, HAS_SOFTCAP
        )
        found = weigh_values(
            found, v_room, slot, weights_SM, gl.convert_layout(decay_M, gl.SliceLayout(0, sums())),
            DIM_V, V_BITS, V_GROUPS, IS_ROTATED, TOKENS,
        )  # fmt: skip
        slot = 1 - slot
    async_copy.wait_group(0)

    max_M = gl.convert_layout(max_M, gl.SliceLayout(0, sums())) - HEADROOM
    rows_M = row_tile * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums()))
    place = (((row * num_kv_heads + head) * num_splits + split) * NUM_ROWS).to(gl.int64)
    store_values(
        out_ptr, lse_ptr, found, max_M, place, rows_M, NUM_ROWS, DIM_V, V_GROUPS, IS_ROTATED
    )
