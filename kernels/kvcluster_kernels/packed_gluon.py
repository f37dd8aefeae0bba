"""Packed decode for Hopper in Gluon: the integers of `integer_decode.py` and the rotated vectors of
`rotated_decode.py`, with what Triton's compiler would decide decided here.

A program is one warp, which waits for no other. It copies all planes of a block ahead, 16 bytes of
a lane at a time, and reads each number into the register that multiplies it
(`packed_gluon_layouts`), so that a number costs half the instructions or a third of those that the
compiler makes of the kernels of those two modules; these are what it computes.

Shape letters: those of `integer_decode.py`; N query rows, E sixteen equal rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kvcluster_kernels.codes import num_fields
from kvcluster_kernels.packed_gluon_copies import (
    append,
    in_slot,
    load_units,
    planes_of,
    start_copies,
)
from kvcluster_kernels.packed_gluon_layouts import in_places, line, sums
from kvcluster_kernels.packed_gluon_tiles import (
    HEADROOM,
    equal_sums,
    exponent_of,
    load_queries,
    score_block,
    store_group,
    value_exponent,
    weigh_block,
    weights_of,
)
from kvcluster_kernels.paging import (
    ROW_NUMBERS,
    ROW_POINTERS,
    let_next_start,
    split_tiles,
    wait_for_earlier,
)

_LEAST_FACTOR = gl.constexpr(2.0**-126)


@gluon.jit
def _fetch(
    copies, units, unit_planes, slot, tile, stop, block, head, num_kv_heads,
    PAGE_BLOCKS: gl.constexpr, SCALE_BITS: gl.constexpr,
):  # fmt: skip
    """Start to copy a tile's block, if there is one, and add its units to those under way."""
    if tile < stop:
        start_copies(copies, slot, block, head, num_kv_heads, PAGE_BLOCKS)
    async_copy.commit_group()
    if SCALE_BITS == 8:
        units = append(units, load_units(unit_planes, block, head, num_kv_heads, PAGE_BLOCKS))
    return units


@gluon.jit
def _attend(
    found, keys, values, queries, units, scale, softcap, first, start, end, position,
    q_positions_N, window, BLOCK_SIZE: gl.constexpr, DIM_K: gl.constexpr, DIM_V: gl.constexpr,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr, K_GROUPS: gl.constexpr, SCALE_BITS: gl.constexpr,
    HAS_POSITIONS: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_WINDOW: gl.constexpr,
    IS_ROTATED: gl.constexpr, HAS_MEAN: gl.constexpr,
):  # fmt: skip
    """What was found, with one block more: maximum, sum of weights, values and zero-points."""
    max_N, total_EN, acc, zeros = found
    q_fields, size_N, plain_q, plain_size_N = queries
    factor_N = size_N
    if not IS_ROTATED:
        factor_N = size_N * 2.0**24
    if SCALE_BITS == 8:
        # Where all keys are zero, so is their unit; a factor of -inf must not be.
        factor_N = gl.maximum(factor_N * units[0][0], _LEAST_FACTOR)
    offset_N = gl.zeros([max_N.shape[0]], gl.float32, gl.SliceLayout(0, sums()))
    if HAS_MEAN:
        offset_N = equal_sums(in_places(keys[3].load(line(DIM_K)), 0), plain_q[0]) * plain_size_N
    scores, largest_N, factor_N, offset_N = score_block(
        keys, q_fields, factor_N, offset_N, scale, softcap, first, start, end, position,
        q_positions_N, window, BLOCK_SIZE, max(num_fields(V_BITS), K_GROUPS), DIM_K, K_BITS,
        K_GROUPS, HAS_POSITIONS, HAS_SOFTCAP, HAS_WINDOW, IS_ROTATED,
    )  # fmt: skip
    exponent = exponent_of(units[0][1]) if SCALE_BITS == 8 else value_exponent(values[2])
    weights, max_N, decay_N, some_EN = weights_of(
        scores, largest_N, factor_N, offset_N, exponent, max_N
    )
    shrink = gl.exp2(-exponent)
    acc, zeros = weigh_block(
        acc, zeros, decay_N, values, weights, shrink, BLOCK_SIZE, DIM_V, V_BITS, IS_ROTATED
    )
    return max_N, total_EN * decay_N[None, :] + some_EN * shrink, acc, zeros


@gluon.jit(do_not_specialize=ROW_NUMBERS, do_not_specialize_on_alignment=ROW_POINTERS)
def packed_kernel(
    q_ptr, plain_q_ptr,
    k_codes_ptr, k_high_ptr, k_scale_ptr, k_zero_ptr, k_unit_ptr,
    v_codes_ptr, v_high_ptr, v_scale_ptr, v_zero_ptr, v_unit_ptr,
    blocks_ptr, starts_ptr, ends_ptr, block_positions_ptr, q_positions_ptr, out_ptr, lse_ptr,
    scale, softcap, window, max_blocks, num_splits,
    stride_k_codes, stride_k_high, stride_k_scale, stride_k_zero, stride_k_unit,
    stride_v_codes, stride_v_high, stride_v_scale, stride_v_zero, stride_v_unit,
    NUM_ROWS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_POSITIONS: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_WINDOW: gl.constexpr,
    OVERLAPS: gl.constexpr, BLOCK_SIZE: gl.constexpr, PAGE_BLOCKS: gl.constexpr,
    DIM_K: gl.constexpr, DIM_V: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr,
    K_GROUPS: gl.constexpr, V_GROUPS: gl.constexpr, SCALE_BITS: gl.constexpr,
    IS_ROTATED: gl.constexpr, HAS_MEAN: gl.constexpr, STAGES: gl.constexpr,
    BEGINS_EARLY: gl.constexpr,
):  # fmt: skip
    """Arguments as of `integer_decode._integer_kernel` and `rotated_decode._rotated_kernel`: scales
    of rotated keys are one for each token, and their zero is a mean. `high` are third bits."""
    let_next_start(OVERLAPS)
    ROW_TILES: gl.constexpr = (NUM_ROWS + BLOCK_M - 1) // BLOCK_M
    split, row_tile = gl.program_id(0) // ROW_TILES, gl.program_id(0) % ROW_TILES
    head, num_kv_heads, row = gl.program_id(1), gl.num_programs(1), gl.program_id(2)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, BLOCK_SIZE)
    keys, key_copies = planes_of(
        k_codes_ptr, k_high_ptr, k_scale_ptr, k_zero_ptr,
        stride_k_codes, stride_k_high, stride_k_scale, stride_k_zero, BLOCK_SIZE * DIM_K, K_BITS,
        BLOCK_SIZE if IS_ROTATED else K_GROUPS * DIM_K,
        DIM_K * HAS_MEAN if IS_ROTATED else K_GROUPS * DIM_K, STAGES,
    )  # fmt: skip
    values, value_copies = planes_of(
        v_codes_ptr, v_high_ptr, v_scale_ptr, v_zero_ptr,
        stride_v_codes, stride_v_high, stride_v_scale, stride_v_zero, BLOCK_SIZE * DIM_V, V_BITS,
        V_GROUPS * BLOCK_SIZE, 0 if IS_ROTATED else V_GROUPS * BLOCK_SIZE, STAGES,
    )  # fmt: skip
    blocks_ptr += row.to(gl.int64) * max_blocks
    block_positions_ptr += row.to(gl.int64) * max_blocks
    copies = (
        key_copies[0] + value_copies[0],
        key_copies[1] + value_copies[1],
        key_copies[2] + value_copies[2],
    )
    unit_planes = (k_unit_ptr, v_unit_ptr, stride_k_unit, stride_v_unit)
    # The first blocks are on their way while the queries are still asked for.
    last = gl.maximum(stop - 1, begin)
    units = ()
    for stage in gl.static_range(STAGES - 1):
        block = gl.load(blocks_ptr + gl.minimum(begin + stage, last), mask=stop > begin, other=0)
        units = _fetch(
            copies, units, unit_planes, stage, begin + stage, stop, block, head, num_kv_heads,
            PAGE_BLOCKS, SCALE_BITS,
        )  # fmt: skip
    block = gl.load(blocks_ptr + gl.minimum(begin + STAGES - 1, last), mask=stop > begin, other=0)

    columns: gl.constexpr = gl.SliceLayout(0, sums())
    rows_N = row_tile * BLOCK_M + gl.arange(0, BLOCK_M, columns)
    first_line = (row * (NUM_ROWS // GROUP) * num_kv_heads + head) * GROUP
    q_fields, size_N = load_queries(
        q_ptr, first_line, num_kv_heads, row_tile, BLOCK_M, NUM_ROWS, GROUP, DIM_K, K_BITS,
        IS_ROTATED,
    )  # fmt: skip
    plain_q, plain_size_N = q_fields, size_N
    if HAS_MEAN:
        plain_q, plain_size_N = load_queries(
            plain_q_ptr, first_line, num_kv_heads, row_tile, BLOCK_M, NUM_ROWS, GROUP, DIM_K, 8,
            True,  # noqa: FBT003
        )  # fmt: skip
    queries = (q_fields, size_N, plain_q, plain_size_N)
    q_positions_N = rows_N
    if HAS_POSITIONS:
        q_positions_ptr += row * (NUM_ROWS // GROUP)
        q_positions_N = gl.load(q_positions_ptr + rows_N // GROUP, mask=rows_N < NUM_ROWS, other=0)
    max_N = gl.full([BLOCK_M], -float("inf"), gl.float32, columns)
    total_EN = gl.zeros([16, BLOCK_M], gl.float32, sums())
    acc = ()
    zeros = ()
    for _ in gl.static_range(V_GROUPS):
        acc = append(acc, gl.zeros([DIM_V // V_GROUPS, BLOCK_M], gl.float32, sums()))
        zeros = append(zeros, gl.zeros([16, BLOCK_M], gl.float32, sums()))
    found = (max_N, total_EN, acc, zeros)
    slot = 0
    for tile in range(begin, stop):
        ahead = gl.where(slot == 0, STAGES - 1, slot - 1)
        units = _fetch(
            copies, units, unit_planes, ahead, tile + STAGES - 1, stop, block, head, num_kv_heads,
            PAGE_BLOCKS, SCALE_BITS,
        )  # fmt: skip
        block = gl.load(blocks_ptr + gl.minimum(tile + STAGES, last))
        position = gl.load(block_positions_ptr + tile) if HAS_POSITIONS else tile
        async_copy.wait_group(STAGES - 1)
        found = _attend(
            found, in_slot(keys, slot), in_slot(values, slot), queries, units, scale, softcap,
            tile * BLOCK_SIZE, start, end, position, q_positions_N, window, BLOCK_SIZE, DIM_K,
            DIM_V, K_BITS, V_BITS, K_GROUPS, SCALE_BITS, HAS_POSITIONS, HAS_SOFTCAP, HAS_WINDOW,
            IS_ROTATED, HAS_MEAN,
        )  # fmt: skip
        units = units[1:]
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)

    wait_for_earlier(BEGINS_EARLY)
    max_N, total_EN, acc, zeros = found
    place = (((row * num_kv_heads + head) * num_splits + split) * NUM_ROWS).to(gl.int64)
    for group in gl.static_range(V_GROUPS):
        # Rotated values have no zero-points, and their levels are what they are.
        out_DN = acc[group] * (1.0 if IS_ROTATED else 2.0**24) + gl.max(zeros[group], 0)[None, :]
        store_group(
            out_ptr, lse_ptr, out_DN, max_N - HEADROOM, gl.max(total_EN, 0), place, rows_N,
            NUM_ROWS, DIM_V, group * (DIM_V // V_GROUPS),
        )  # fmt: skip
