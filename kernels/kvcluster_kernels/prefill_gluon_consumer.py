"""The groups of the pipelined prefill kernel that multiply.

One program holds 64 query rows of one head in each of its consumer warp groups. A producer group
feeds them keys and values through rings in shared memory by the copy engine. A consumer asks the
matrix unit for the logits of the next keys before it multiplies the weights of the present ones
with their values, so that its softmax runs beside the matrix unit, and consumers take turns with
that, so that their softmaxes do not run at the same time (Shah et al. 2024, FlashAttention-3,
§3.1 and 3.2). Keys are walked from the last to the first: those that some rows do not see are then
the first ones, and the loop that takes the time has no mask.

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

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _barrier(asm: gl.constexpr):
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _await_turn(CONSUMER: gl.constexpr, PING_PONG: gl.constexpr):
    """Block until the consumer before has asked for its products: 256 threads, its and ours."""
    if PING_PONG:
        if CONSUMER == 0:
            _barrier("bar.sync 8, 256; mov.u32 $0, 0;")
        elif CONSUMER == 1:
            _barrier("bar.sync 9, 256; mov.u32 $0, 0;")
        else:
            _barrier("bar.sync 10, 256; mov.u32 $0, 0;")


@gluon.jit
def _give_turn(CONSUMER: gl.constexpr, PING_PONG: gl.constexpr):
    """Let that consumer go on, without waiting for it."""
    if PING_PONG:
        if CONSUMER == 0:
            _barrier("bar.arrive 8, 256; mov.u32 $0, 0;")
        elif CONSUMER == 1:
            _barrier("bar.arrive 9, 256; mov.u32 $0, 0;")
        else:
            _barrier("bar.arrive 10, 256; mov.u32 $0, 0;")


@gluon.jit
def _masked(s_MN, key, limit_M, BLOCK_N: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Logits of keys from `key` on, -inf where they are not below the row's limit."""
    offs_N = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
    seen_MN = gl.expand_dims(offs_N, 0) < gl.expand_dims(limit_M - key, 1)
    return gl.where(seen_MN, s_MN, float("-inf"))


@gluon.jit
def _softmax(s_MN, max2_M, scale2, MASKED: gl.constexpr):
    """Weights of these logits by the new maximum, that one, and what the old one's count for."""
    new_max2_M = gl.maximum(max2_M, gl.max(s_MN, 1) * scale2)
    shift_M = new_max2_M
    if MASKED:
        # A row that has seen no key: -inf minus -inf is NaN.
        shift_M = gl.where(new_max2_M == float("-inf"), 0.0, new_max2_M)
    weights_MN = gl.exp2(s_MN * scale2 - gl.expand_dims(shift_M, 1))
    return weights_MN, new_max2_M, gl.exp2(max2_M - shift_M)


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
    max2_M,
    sums_MQ,
    zeros_MN,
    q,
    k_smem,
    v_smem,
    k_full,
    k_empty,
    v_full,
    v_empty,
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
    PING_PONG: gl.constexpr,
    CAUSAL: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
    Q_LAYOUT: gl.constexpr,
):
    """All steps of a tile but the first one.

    Before and after a step: `weights_MN` are those of the step before, not yet multiplied with
    their values; `acc_MD` has those of all earlier ones, by the present maximum; keys of the next
    step are there. No product is under way: what it reads or adds to must not be carried into the
    next turn of the loop, where the assembler takes its registers for others.
    """
    for i in range(1, num_steps):
        k_slot = (base + i) % STAGES
        v_slot = (base + i - 1) % STAGES
        _await_turn(CONSUMER, PING_PONG)
        s_MN = warpgroup_mma(
            q, k_smem.index(k_slot).permute((1, 0)), zeros_MN, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(v_slot), ((base + i - 1) // STAGES) & 1)
        acc_MD = warpgroup_mma(weights_MN, v_smem.index(v_slot), acc_MD, is_async=True)
        _give_turn((CONSUMER + 1) % CONSUMERS, PING_PONG)
        s_MN = warpgroup_mma_wait(1, deps=[s_MN])
        mbarrier.arrive(k_empty.index(k_slot), count=1)
        if CAUSAL:  # noqa: SIM102
            # A branch, not a loop of its own: what runs on from one loop into another one is
            # serialised by the assembler.
            if i < num_masked:
                key = (num_steps - 1 - i) * BLOCK_N
                s_MN = _masked(s_MN, key, limit_M, BLOCK_N, S_LAYOUT)
        new_weights_MN, max2_M, decay_M = _softmax(s_MN, max2_M, scale2, CAUSAL)
        sums_MQ = _rows_times(sums_MQ, decay_M, Q_LAYOUT)
        sums_MQ += _own_sums(new_weights_MN, BLOCK_M, BLOCK_N, Q_LAYOUT)
        # Keys of the next step are waited for here, because the assembler would move the wait for
        # the product up to before the weights' computation, on which it does not depend, but not
        # past another wait.
        next_step = base + i + 1
        mbarrier.wait(
            k_full.index(next_step % STAGES), (next_step // STAGES) & 1, pred=i + 1 < num_steps
        )
        acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        acc_MD = _rows_times(acc_MD, decay_M, O_LAYOUT)
        weights_MN = gl.convert_layout(
            new_weights_MN.to(weights_MN.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2)
        )
    return acc_MD, weights_MN, max2_M, sums_MQ


@gluon.jit
def consume(
    q_smem,
    k_smem,
    v_smem,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
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
    PING_PONG: gl.constexpr,
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
    q = q_smem.index(CONSUMER)
    zeros_MN = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    if CONSUMER == CONSUMERS - 1:
        _give_turn(0, PING_PONG)
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
        k_slot = base % STAGES
        mbarrier.wait(k_full.index(k_slot), (base // STAGES) & 1)
        s_MN = warpgroup_mma(
            q, k_smem.index(k_slot).permute((1, 0)), zeros_MN, use_acc=False, is_async=True
        )
        s_MN = warpgroup_mma_wait(0, deps=[s_MN])
        mbarrier.arrive(k_empty.index(k_slot), count=1)
        s_MN = _masked(s_MN, (num_steps - 1) * BLOCK_N, limit_M, BLOCK_N, S_LAYOUT)
        max2_M = gl.full([BLOCK_M], float("-inf"), gl.float32, ROW_LAYOUT)
        weights_MN, max2_M, _ = _softmax(s_MN, max2_M, scale2, MASKED=True)
        sums_MQ = _own_sums(weights_MN, BLOCK_M, BLOCK_N, Q_LAYOUT)
        weights_MN = gl.convert_layout(weights_MN.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
        acc_MD = gl.zeros([BLOCK_M, DIM], gl.float32, O_LAYOUT)
        mbarrier.wait(
            k_full.index((base + 1) % STAGES), ((base + 1) // STAGES) & 1, pred=num_steps > 1
        )
        acc_MD, weights_MN, max2_M, sums_MQ = _walk(
            acc_MD,
            weights_MN,
            max2_M,
            sums_MQ,
            zeros_MN,
            q,
            k_smem,
            v_smem,
            k_full,
            k_empty,
            v_full,
            v_empty,
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
            PING_PONG=PING_PONG,
            CAUSAL=CAUSAL,
            S_LAYOUT=S_LAYOUT,
            O_LAYOUT=O_LAYOUT,
            Q_LAYOUT=Q_LAYOUT,
        )
        mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        base += num_steps
        v_slot = (base - 1) % STAGES
        mbarrier.wait(v_full.index(v_slot), ((base - 1) // STAGES) & 1)
        acc_MD = warpgroup_mma(weights_MN, v_smem.index(v_slot), acc_MD, is_async=True)
        acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
        mbarrier.arrive(v_empty.index(v_slot), count=1)

        tokens_M = first_row + gl.arange(0, BLOCK_M, OUT_ROW_LAYOUT)
        is_row_M = tokens_M < num_tokens
        rows_M = tokens_M.to(gl.int64) * NUM_HEADS + head
        offs_D = gl.arange(0, DIM, gl.SliceLayout(0, O_LAYOUT))
        max2_M = gl.convert_layout(max2_M, OUT_ROW_LAYOUT)
        sum_M = gl.convert_layout(gl.sum(sums_MQ, 1), OUT_ROW_LAYOUT)
        mask_MD = gl.expand_dims(is_row_M, 1) & (gl.expand_dims(offs_D, 0) < DIM)
        if CARRIED:
            carry2_M = gl.load(carry_lse_ptr + rows_M, mask=is_row_M, other=float("-inf"))
            carry2_M = carry2_M * _LOG2_E
            new_max2_M = gl.maximum(max2_M, carry2_M)
            shift_M = gl.where(new_max2_M == float("-inf"), 0.0, new_max2_M)
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
