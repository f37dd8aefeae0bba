"""What the groups of the pipelined prefill kernel share: who walks over which keys, and the group
that fetches them.

Shape letters: T query tokens, S keys, H query heads, K KV heads, P pages, D head dimension, M rows
of a consumer, N keys of a step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kvcluster_kernels.prefill_gluon_signals import V_ROOMS, await_room

# Renamed after Triton 3.6.
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def position(token, start, split, resume):
    """Where among the keys a row lies."""
    return gl.where(token < split, token + start, token + (resume - split))


@gluon.jit
def turns(num_tiles):
    """How many tiles this program has."""
    programs = gl.num_programs(0)
    rounds = num_tiles // programs
    place = gl.program_id(0)
    if rounds % 2 == 1:
        place = programs - 1 - place
    return rounds + gl.where(place < num_tiles % programs, 1, 0)


@gluon.jit
def tile(turn, num_row_tiles, heads_at_once, CAUSAL: gl.constexpr):
    """Row tile and head of this program's turn.

    Every other round runs backwards, so that who had the longest of one has the shortest of the
    next one.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = programs - 1 - place
    index = turn * programs + place
    if CAUSAL:
        # The longest walks first, for as many heads as L2 holds keys of.
        group = index // (num_row_tiles * heads_at_once)
        rest = index % (num_row_tiles * heads_at_once)
        row_tile = num_row_tiles - 1 - rest // heads_at_once
        head = group * heads_at_once + rest % heads_at_once
    else:
        row_tile = index % num_row_tiles
        head = index // num_row_tiles
    return row_tile, head


@gluon.jit
def steps(
    row_tile,
    num_tokens,
    num_keys,
    start,
    split,
    resume,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Steps of a row tile, and how many of them, the first ones of all, all rows see whole."""
    end = num_keys
    plain = num_keys // BLOCK_N
    if CAUSAL:
        last = gl.minimum(num_tokens, row_tile * ROWS + ROWS) - 1
        end = gl.minimum(num_keys, position(last, start, split, resume) + 1)
        lowest = position(row_tile * ROWS, start, split, resume)
        plain = gl.minimum(plain, (lowest + 1) // BLOCK_N)
    return (end + BLOCK_N - 1) // BLOCK_N, plain


@gluon.jit
def _copy_keys(
    desc,
    blocks_ptr,
    head,
    first,
    num_keys,
    barrier,
    room,
    empty,
    phase,
    BLOCK_N: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr,
    PAGE_BLOCKS: gl.constexpr,
):
    """Ask for keys first .. first + BLOCK_N as soon as the room is empty; what lies behind the last
    one is zero or unread."""
    NUM_BYTES: gl.constexpr = BLOCK_N * desc.block_type.shape[3] * 2
    # Where blocks lie is looked up while the room is waited for.
    if BLOCK_TOKENS == 0:
        await_room(empty, phase)
        mbarrier.expect(barrier, NUM_BYTES)
        _copy(desc, [0, head, first, 0], barrier, room)
    elif BLOCK_TOKENS >= BLOCK_N:
        block = gl.load(blocks_ptr + first // BLOCK_TOKENS)
        await_room(empty, phase)
        mbarrier.expect(barrier, NUM_BYTES)
        slot = block % PAGE_BLOCKS * BLOCK_TOKENS + first % BLOCK_TOKENS
        _copy(desc, [block // PAGE_BLOCKS, head, slot, 0], barrier, room)
    else:
        blocks = ()
        for i in gl.static_range(BLOCK_N // BLOCK_TOKENS):
            key = first + i * BLOCK_TOKENS
            # A block that is not there is read from behind the last page: as zeros.
            block = gl.load(blocks_ptr + key // BLOCK_TOKENS, mask=key < num_keys, other=1 << 30)
            blocks = blocks + (block,)  # type: ignore[assignment]  # noqa: RUF005
        await_room(empty, phase)
        mbarrier.expect(barrier, NUM_BYTES)
        for i in gl.static_range(BLOCK_N // BLOCK_TOKENS):
            slot = blocks[i] % PAGE_BLOCKS * BLOCK_TOKENS
            part = room.slice(i * BLOCK_TOKENS, BLOCK_TOKENS)
            _copy(desc, [blocks[i] // PAGE_BLOCKS, head, slot, 0], barrier, part)


@gluon.jit
def produce(
    q_desc,
    k_desc,
    v_desc,
    blocks_ptr,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    q_empty,
    k_full,
    v_full,
    num_row_tiles,
    num_tokens,
    num_keys,
    start,
    split,
    resume,
    heads_at_once,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr,
    PAGE_BLOCKS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    ROWS: gl.constexpr = BLOCK_M * CONSUMERS
    step = 0
    for turn in range(turns(num_row_tiles * NUM_HEADS)):
        row_tile, head = tile(turn, num_row_tiles, heads_at_once, CAUSAL)
        num_steps, _ = steps(
            row_tile, num_tokens, num_keys, start, split, resume, ROWS, BLOCK_N, CAUSAL
        )
        for g in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
            _copy(
                q_desc,
                [row_tile * ROWS + g * BLOCK_M, head, 0],
                q_full.index(g),
                q_smem.index(g),
            )
        kv_head = head // GROUP
        # Values follow one step behind, as they are used.
        for i in range(num_steps + 1):
            if i < num_steps:
                k_step = step + i
                k_slot = k_step % STAGES
                _copy_keys(
                    k_desc,
                    blocks_ptr,
                    kv_head,
                    (num_steps - 1 - i) * BLOCK_N,
                    num_keys,
                    k_full.index(k_slot),
                    k_smem.index(k_slot),
                    k_slot * 8,
                    ((k_step // STAGES) & 1) ^ 1,
                    BLOCK_N,
                    BLOCK_TOKENS,
                    PAGE_BLOCKS,
                )
            if i > 0:
                v_step = step + i - 1
                v_slot = v_step % STAGES
                _copy_keys(
                    v_desc,
                    blocks_ptr,
                    kv_head,
                    (num_steps - i) * BLOCK_N,
                    num_keys,
                    v_full.index(v_slot),
                    v_smem.index(v_slot),
                    V_ROOMS + v_slot * 8,
                    ((v_step // STAGES) & 1) ^ 1,
                    BLOCK_N,
                    BLOCK_TOKENS,
                    PAGE_BLOCKS,
                )
        step += num_steps
