"""Prefill attention for Hopper in Gluon: what Triton's compiler would decide is decided here.

One program: consumer groups of four warps that multiply (`prefill_gluon_consumer`), and a producer
group that feeds them (`prefill_gluon_producer`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kvcluster_kernels.prefill_gluon_consumer import consume
from kvcluster_kernels.prefill_gluon_producer import produce
from kvcluster_kernels.prefill_gluon_signals import declare

# A compilation takes seconds: none because of a length.
_NUMBERS = (
    "num_row_tiles",
    "num_tokens",
    "num_keys",
    "start",
    "split",
    "resume",
    "heads_at_once",
)
_FIRST = gl.constexpr(0)
_SECOND = gl.constexpr(1)
_THIRD = gl.constexpr(2)


@gluon.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=("blocks_ptr",))
def prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    blocks_ptr,
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
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    DIM: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr,
    PAGE_BLOCKS: gl.constexpr,
    CAUSAL: gl.constexpr,
    CARRIED: gl.constexpr,
    TAKES_TURNS: gl.constexpr,
    HOLDS_QUERIES: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, BLOCK_M, DIM], q_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], q_layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], q_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    declare(CONSUMERS, STAGES)
    for g in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(g), count=1)
        mbarrier.init(q_empty.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    # Written out, because a tuple that is computed loses its constants.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (
                    q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full,
                    out_ptr, lse_ptr, carry_out_ptr, carry_lse_ptr, num_row_tiles, num_tokens,
                    num_keys, start, split, resume, heads_at_once, scale2, _FIRST, NUM_HEADS,
                    BLOCK_M, BLOCK_N, DIM, CONSUMERS, STAGES, CAUSAL, CARRIED, TAKES_TURNS,
                    HOLDS_QUERIES,
                )),
                (consume, (
                    q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full,
                    out_ptr, lse_ptr, carry_out_ptr, carry_lse_ptr, num_row_tiles, num_tokens,
                    num_keys, start, split, resume, heads_at_once, scale2, _SECOND, NUM_HEADS,
                    BLOCK_M, BLOCK_N, DIM, CONSUMERS, STAGES, CAUSAL, CARRIED, TAKES_TURNS,
                    HOLDS_QUERIES,
                )),
                (produce, (
                    q_desc, k_desc, v_desc, blocks_ptr, q_smem, k_smem, v_smem, q_full, q_empty,
                    k_full, v_full, num_row_tiles, num_tokens, num_keys,
                    start, split, resume, heads_at_once, NUM_HEADS, GROUP, BLOCK_M, BLOCK_N,
                    CONSUMERS, STAGES,
                    BLOCK_TOKENS, PAGE_BLOCKS, CAUSAL,
                )),
            ],
            [4, 4],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full,
                    out_ptr, lse_ptr, carry_out_ptr, carry_lse_ptr, num_row_tiles, num_tokens,
                    num_keys, start, split, resume, heads_at_once, scale2, _FIRST, NUM_HEADS,
                    BLOCK_M, BLOCK_N, DIM, CONSUMERS, STAGES, CAUSAL, CARRIED, TAKES_TURNS,
                    HOLDS_QUERIES,
                )),
                (consume, (
                    q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full,
                    out_ptr, lse_ptr, carry_out_ptr, carry_lse_ptr, num_row_tiles, num_tokens,
                    num_keys, start, split, resume, heads_at_once, scale2, _SECOND, NUM_HEADS,
                    BLOCK_M, BLOCK_N, DIM, CONSUMERS, STAGES, CAUSAL, CARRIED, TAKES_TURNS,
                    HOLDS_QUERIES,
                )),
                (consume, (
                    q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full,
                    out_ptr, lse_ptr, carry_out_ptr, carry_lse_ptr, num_row_tiles, num_tokens,
                    num_keys, start, split, resume, heads_at_once, scale2, _THIRD, NUM_HEADS,
                    BLOCK_M, BLOCK_N, DIM, CONSUMERS, STAGES, CAUSAL, CARRIED, TAKES_TURNS,
                    HOLDS_QUERIES,
                )),
                (produce, (
                    q_desc, k_desc, v_desc, blocks_ptr, q_smem, k_smem, v_smem, q_full, q_empty,
                    k_full, v_full, num_row_tiles, num_tokens, num_keys,
                    start, split, resume, heads_at_once, NUM_HEADS, GROUP, BLOCK_M, BLOCK_N,
                    CONSUMERS, STAGES,
                    BLOCK_TOKENS, PAGE_BLOCKS, CAUSAL,
                )),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
