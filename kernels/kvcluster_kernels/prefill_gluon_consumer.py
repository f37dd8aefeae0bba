"""The groups of the pipelined prefill kernel that multiply.

One program holds 64 query rows of one head in each of its consumer warp groups. A producer group
feeds them keys and values through rings in shared memory by the copy engine. A consumer asks the
matrix unit for the logits of the next keys before it multiplies the weights of the present ones
with their values, so that its softmax runs beside the matrix unit, and consumers take turns with
that, so that their softmaxes do not run at the same time (Shah et al. 2024, FlashAttention-3,
§3.1 and 3.2). Keys are walked from the last to the first: those that some rows do not see are then
the first ones, and the loop that takes the time has no mask.

What is subtracted from logits is not their maximum but a number that they are at most 2^8 times
above, after exponentiation: it stays where it is while that is so, and sums are only multiplied
where it moves, which after a few steps is hardly ever. A warp decides that for its rows, from what
each of its threads has; they tell each other their maxima only where it moves. Weights are of as
many digits either way, and nothing that is summed comes near the end of its range.

Shape letters: T query tokens, S keys, H query heads, K KV heads, P pages, D head dimension, M rows
of a consumer, N keys of a step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvcluster_kernels.prefill_gluon_producer import position, steps, tile, turns
from kvcluster_kernels.prefill_gluon_signals import (
    V_ROOMS,
    await_turn,
    free_room,
    give_turn,
    has_grown,
    note_growth,
    zero_after,
)

_SLACK = gl.constexpr(8.0)
"""How far, in base 2, logits may be above what is subtracted from them."""
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _masked(s_MN, key, limit_M, BLOCK_N: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Logits of keys from `key` on, -inf where they are not below the row's limit.

    Columns are taken apart by what tells them apart in a thread, so that its limit meets constants:
    numbers of all columns would take a register each.
    """
    BLOCK_M: gl.constexpr = s_MN.shape[0]
    s_MEQP = gl.reshape(s_MN, [BLOCK_M, BLOCK_N // 8, 4, 2])
    LAYOUT: gl.constexpr = s_MEQP.type.layout
    MEQ: gl.constexpr = gl.SliceLayout(3, LAYOUT)
    MQ: gl.constexpr = gl.SliceLayout(1, MEQ)
    quads_Q = gl.arange(0, 4, gl.SliceLayout(0, MQ))
    limit_M = gl.convert_layout(limit_M, gl.SliceLayout(1, MQ))
    limit_MQ = gl.expand_dims(limit_M - key, 1) - gl.expand_dims(quads_Q * 2, 0)
    limit_M1Q1 = gl.expand_dims(gl.expand_dims(limit_MQ, 1), 3)
    eights_E = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, MEQ))) * 8
    eights_1E11 = gl.expand_dims(gl.expand_dims(gl.expand_dims(eights_E, 0), 2), 3)
    pairs_P = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    pairs_111P = gl.expand_dims(gl.expand_dims(gl.expand_dims(pairs_P, 0), 1), 2)
    s_MEQP = gl.where(eights_1E11 + pairs_111P < limit_M1Q1, s_MEQP, float("-inf"))
    return gl.convert_layout(gl.reshape(s_MEQP, [BLOCK_M, BLOCK_N]), S_LAYOUT)


@gluon.jit
def _without_nothing(max2_M):
    """Zero for a row that has seen no key: -inf minus -inf is NaN."""
    return gl.where(max2_M == float("-inf"), 0.0, max2_M)


@gluon.jit
def _own_max(s_MN, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """The largest of what each of the four threads of a row has."""
    parts = gl.reshape(s_MN, [BLOCK_M, BLOCK_N // 8, 4, 2])
    return gl.convert_layout(gl.max(gl.max(parts, 3), 1), LAYOUT)


@gluon.jit
def _own_sums(weights_MN, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Sums of what each of the four threads of a row has: no thread waits for another."""
    parts = gl.reshape(weights_MN, [BLOCK_M, BLOCK_N // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(parts, 3), 1), LAYOUT)


@gluon.jit
def _rows_times(x, factor_M, LAYOUT: gl.constexpr):
    """x with each row multiplied."""
    return x * gl.expand_dims(gl.convert_layout(factor_M, gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def _walk(
    acc_MD,
    weights_MN,
    shift2_M,
    sums_MQ,
    zeros_MN,
    q,
    k_smem,
    v_smem,
    k_full,
    v_full,
    limit_M,
    scale2,
    base,
    num_steps,
    num_masked,
    CONSUMER: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    TAKES_TURNS: gl.constexpr,
    CAUSAL: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
    Q_LAYOUT: gl.constexpr,
):
    """All steps of a tile but the first one.

    Before and after a step: `weights_MN` are those of the step before, not yet multiplied with
    their values; `acc_MD` has those of all earlier ones, by the present shift; keys of the next
    step are there. No product is under way: what it reads or adds to must not be carried into the
    next turn of the loop, where the assembler takes its registers for others.
    """
    ROWS_OF_Q: gl.constexpr = gl.SliceLayout(1, Q_LAYOUT)
    for i in range(1, num_steps):
        k_slot = (base + i) % STAGES
        v_slot = (base + i - 1) % STAGES
        await_turn(CONSUMER, TAKES_TURNS)
        s_MN = warpgroup_mma(
            q, k_smem.index(k_slot).permute((1, 0)), zeros_MN, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(v_slot), ((base + i - 1) // STAGES) & 1)
        acc_MD = warpgroup_mma(weights_MN, v_smem.index(v_slot), acc_MD, is_async=True)
        give_turn((CONSUMER + 1) % CONSUMERS, TAKES_TURNS)
        s_MN = warpgroup_mma_wait(1, deps=[s_MN])
        free_room(k_slot * 8)
        if CAUSAL:  # noqa: SIM102
            # A branch, not a loop of its own: what runs on from one loop into another one is
            # serialised by the assembler.
            if i < num_masked:
                key = (num_steps - 1 - i) * BLOCK_N
                s_MN = _masked(s_MN, key, limit_M, BLOCK_N, S_LAYOUT)
        own_MQ = _own_max(s_MN, BLOCK_M, BLOCK_N, Q_LAYOUT) * scale2
        bound_MQ = gl.expand_dims(gl.convert_layout(shift2_M + _SLACK, ROWS_OF_Q), 1)
        note_growth(own_MQ, gl.broadcast(bound_MQ, own_MQ)[0])
        decay_M = gl.full([BLOCK_M], 1.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        if has_grown():
            largest_M = gl.convert_layout(gl.max(own_MQ, 1), gl.SliceLayout(1, S_LAYOUT))
            new_shift2_M = gl.maximum(shift2_M, largest_M)
            decay_M = gl.exp2(shift2_M - _without_nothing(new_shift2_M))
            shift2_M = new_shift2_M
            sums_MQ = _rows_times(sums_MQ, decay_M, Q_LAYOUT)
        lowered_M = _without_nothing(shift2_M) if CAUSAL else shift2_M
        new_weights_MN = gl.exp2(s_MN * scale2 - gl.expand_dims(lowered_M, 1))
        sums_MQ += _own_sums(new_weights_MN, BLOCK_M, BLOCK_N, Q_LAYOUT)
        # Keys of the next step are waited for here, and only once the weights are known, because
        # the assembler would move the wait for the product up to before their computation, on which
        # it does not depend, but not past another wait.
        next_step = base + i + 1
        phase = ((next_step // STAGES) & 1) + zero_after(sums_MQ)
        mbarrier.wait(k_full.index(next_step % STAGES), phase, pred=i + 1 < num_steps)
        acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
        free_room(V_ROOMS + v_slot * 8)
        if has_grown():
            acc_MD = _rows_times(acc_MD, decay_M, O_LAYOUT)
        weights_MN = gl.convert_layout(
            new_weights_MN.to(weights_MN.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2)
        )
    return acc_MD, weights_MN, shift2_M, sums_MQ


@gluon.jit
def _store(
    acc_MD,
    max2_M,
    sum_M,
    out_ptr,
    lse_ptr,
    carry_out_ptr,
    carry_lse_ptr,
    rows_M,
    is_row_M,
    DIM: gl.constexpr,
    CARRIED: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):
    """Write a tile's rows, merged with what they saw before."""
    offs_D = gl.arange(0, DIM, gl.SliceLayout(0, O_LAYOUT))
    mask_MD = gl.expand_dims(is_row_M, 1) & (gl.expand_dims(offs_D, 0) < DIM)
    if CARRIED:
        carry2_M = gl.load(carry_lse_ptr + rows_M, mask=is_row_M, other=float("-inf"))
        carry2_M = carry2_M * _LOG2_E
        new_max2_M = gl.maximum(max2_M, carry2_M)
        shift_M = _without_nothing(new_max2_M)
        decay_M = gl.exp2(max2_M - shift_M)
        share_M = gl.exp2(carry2_M - shift_M)
        sum_M = sum_M * decay_M + share_M
        carry_MD = gl.load(
            gl.expand_dims(carry_out_ptr + rows_M * DIM, 1) + gl.expand_dims(offs_D, 0),
            mask=mask_MD,
            other=0.0,
        )
        acc_MD = acc_MD * gl.expand_dims(decay_M, 1) + carry_MD * gl.expand_dims(share_M, 1)
        max2_M = new_max2_M
    seen_M = sum_M > 0.0
    divisor_M = gl.where(seen_M, sum_M, 1.0)
    gl.store(
        gl.expand_dims(out_ptr + rows_M * DIM, 1) + gl.expand_dims(offs_D, 0),
        (acc_MD * gl.expand_dims(1.0 / divisor_M, 1)).to(out_ptr.dtype.element_ty),
        mask=mask_MD,
    )
    lse_M = gl.where(seen_M, (max2_M + gl.log2(divisor_M)) * _LN_2, float("-inf"))
    gl.store(lse_ptr + rows_M, lse_M, mask=is_row_M)


@gluon.jit
def consume(
    q_smem,
    k_smem,
    v_smem,
    q_full,
    q_empty,
    k_full,
    v_full,
    out_ptr,
    lse_ptr,
    carry_out_ptr,
    carry_lse_ptr,
    num_row_tiles,
    num_tokens,
    num_keys,
    start,
    split,
    resume,
    heads_at_once,
    scale2,
    CONSUMER: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    DIM: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    CARRIED: gl.constexpr,
    TAKES_TURNS: gl.constexpr,
    HOLDS_QUERIES: gl.constexpr,
):
    ROWS: gl.constexpr = BLOCK_M * CONSUMERS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16]
    )
    # The rows of O_LAYOUT, and the four threads that share one.
    Q_LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[BLOCK_M, 4],
    )
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OUT_ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    if not HOLDS_QUERIES:
        q = q_smem.index(CONSUMER)
    zeros_MN = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    if CONSUMER == CONSUMERS - 1:
        give_turn(0, TAKES_TURNS)
    base = 0
    for turn in range(turns(num_row_tiles * NUM_HEADS)):
        row_tile, head = tile(turn, num_row_tiles, heads_at_once, CAUSAL)
        num_steps, num_plain = steps(
            row_tile, num_tokens, num_keys, start, split, resume, ROWS, BLOCK_N, CAUSAL
        )
        first_row = row_tile * ROWS + CONSUMER * BLOCK_M
        limit_M = gl.full([BLOCK_M], 0, gl.int32, ROW_LAYOUT) + num_keys
        if CAUSAL:
            tokens_M = first_row + gl.arange(0, BLOCK_M, ROW_LAYOUT)
            limit_M = gl.minimum(limit_M, position(tokens_M, start, split, resume) + 1)

        mbarrier.wait(q_full.index(CONSUMER), turn & 1)
        if HOLDS_QUERIES:
            q = q_smem.index(CONSUMER).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        k_slot = base % STAGES
        mbarrier.wait(k_full.index(k_slot), (base // STAGES) & 1)
        s_MN = warpgroup_mma(
            q, k_smem.index(k_slot).permute((1, 0)), zeros_MN, use_acc=False, is_async=True
        )
        s_MN = warpgroup_mma_wait(0, deps=[s_MN])
        free_room(k_slot * 8)
        s_MN = _masked(s_MN, (num_steps - 1) * BLOCK_N, limit_M, BLOCK_N, S_LAYOUT)
        shift2_M = gl.max(s_MN, 1) * scale2
        weights_MN = gl.exp2(s_MN * scale2 - gl.expand_dims(_without_nothing(shift2_M), 1))
        sums_MQ = _own_sums(weights_MN, BLOCK_M, BLOCK_N, Q_LAYOUT)
        weights_MN = gl.convert_layout(weights_MN.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
        acc_MD = gl.zeros([BLOCK_M, DIM], gl.float32, O_LAYOUT)
        mbarrier.wait(
            k_full.index((base + 1) % STAGES), ((base + 1) // STAGES) & 1, pred=num_steps > 1
        )
        acc_MD, weights_MN, shift2_M, sums_MQ = _walk(
            acc_MD,
            weights_MN,
            shift2_M,
            sums_MQ,
            zeros_MN,
            q,
            k_smem,
            v_smem,
            k_full,
            v_full,
            limit_M,
            scale2,
            base,
            num_steps,
            num_steps - num_plain,
            CONSUMER=CONSUMER,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            CONSUMERS=CONSUMERS,
            STAGES=STAGES,
            TAKES_TURNS=TAKES_TURNS,
            CAUSAL=CAUSAL,
            S_LAYOUT=S_LAYOUT,
            O_LAYOUT=O_LAYOUT,
            Q_LAYOUT=Q_LAYOUT,
        )
        if not HOLDS_QUERIES:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        base += num_steps
        v_slot = (base - 1) % STAGES
        mbarrier.wait(v_full.index(v_slot), ((base - 1) // STAGES) & 1)
        acc_MD = warpgroup_mma(weights_MN, v_smem.index(v_slot), acc_MD, is_async=True)
        acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
        free_room(V_ROOMS + v_slot * 8)

        tokens_M = first_row + gl.arange(0, BLOCK_M, OUT_ROW_LAYOUT)
        is_row_M = tokens_M < num_tokens
        rows_M = tokens_M.to(gl.int64) * NUM_HEADS + head
        max2_M = gl.convert_layout(shift2_M, OUT_ROW_LAYOUT)
        sum_M = gl.convert_layout(gl.sum(sums_MQ, 1), OUT_ROW_LAYOUT)
        _store(
            acc_MD,
            max2_M,
            sum_M,
            out_ptr,
            lse_ptr,
            carry_out_ptr,
            carry_lse_ptr,
            rows_M,
            is_row_M,
            DIM,
            CARRIED,
            O_LAYOUT,
        )
