"""Launches the pipelined prefill kernel on Hopper, where it serves the call.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvcluster_kernels.paging import num_processors
from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention, check_arguments

try:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from kvcluster_kernels.prefill_gluon_kernel import prefill_kernel
except (ImportError, AttributeError):
    # Experimental in Triton: another version may have other names, and then there is no kernel.
    prefill_kernel = None

_ROWS = 64
"""Query rows of a consumer: what one warp group multiplies at a time."""
_L2_KEY_BYTES = 24 << 20
"""Of keys and values that stay in L2 beside all else."""


class Pipeline(NamedTuple):
    """How the kernel is cut for the processor."""

    block_n: int = 128
    """Keys of a step; a power of two."""
    num_consumers: int = 2
    """Warp groups that multiply, of 64 rows each: 2 or 3."""
    num_stages: int = 2
    """Steps whose keys, and whose values, are in shared memory at a time."""
    takes_turns: bool = True
    """Consumers ask the matrix unit for products in turn, so that one's softmax runs beside the
    other one's products."""
    holds_queries: bool = False
    """Consumers read queries from registers, of which they have enough for that only with two
    consumers, instead of from shared memory, which products of keys read as well."""
    is_persistent: bool = False
    """A program takes tile after tile, and loads the next one's keys while it stores results."""


_PIPELINES = {
    (64, False): Pipeline(num_consumers=3, num_stages=3),
    (64, True): Pipeline(num_consumers=3, num_stages=3),
    (128, False): Pipeline(takes_turns=False, holds_queries=True),
    (128, True): Pipeline(takes_turns=False, is_persistent=True),
}
"""By head size, and whether rows see their past only; chosen with `kvcluster bench kernels`."""


def pipeline_for(dim: int, causal: Causal | None, *, is_paged: bool = False) -> Pipeline:
    """The pipeline of a call that does not name its own."""
    if is_paged and dim == 128 and causal is None:
        # With queries in registers and without turns, blocks are slower than keys in line by 7 %.
        return Pipeline()
    return _PIPELINES[dim, causal is not None]


def is_available(device: torch.device) -> bool:
    """Whether the kernel runs there as it was written: on Hopper, with Triton 3.6. The assembler
    of 3.9 waits for each of its products before it asks for the next one."""
    return (
        prefill_kernel is not None
        and triton.__version__.startswith("3.6.")
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


def reason_against(
    q_THD: Tensor,
    keys: Keys,
    *,
    causal: Causal | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> str | None:
    """Why the kernel does not serve these arguments; None: it does."""
    dim = q_THD.shape[2]
    if q_THD.dtype not in (torch.bfloat16, torch.float16):
        return f"numbers are {q_THD.dtype}"
    if dim not in (64, 128) or keys.v_PKSD.shape[3] != dim:
        return f"heads of {dim} and {keys.v_PKSD.shape[3]}"
    if softcap is not None or sinks_H is not None:
        return "softcap or sinks"
    if causal is not None and (causal.window is not None or causal.start < 0):
        return "a window, or rows before all keys"
    if causal is not None and causal.bound is not None:
        return "a bound that moves with the row's block"
    if keys.num_keys == 0:
        return "no keys"
    if keys.block_ids_N is not None and keys.num_keys % keys.block_tokens:
        # What lies behind the last key of a block would be multiplied with a weight of zero,
        # which does not help where it is NaN.
        return "a block that is not full"
    if any(not _can_be_copied(x) for x in (q_THD, keys.k_PKSD, keys.v_PKSD)):
        return "rows that do not begin at multiples of 16 bytes"
    return None


def prefill(
    q_THD: Tensor,
    keys: Keys,
    *,
    scale: float,
    causal: Causal | None = None,
    carry: PartialAttention | None = None,
    out_dtype: torch.dtype = torch.float32,
    pipeline: Pipeline | None = None,
) -> PartialAttention:
    """As `prefill_reference.prefill`, for arguments that `reason_against` has nothing against, on
    a device that `is_available` names.

    Raises: ValueError for other arguments.
    """
    check_arguments(q_THD, keys, scale, causal, carry)
    reason = reason_against(q_THD, keys, causal=causal)
    if reason is not None:
        raise ValueError(f"prefill in Gluon: {reason}")
    num_tokens, num_heads, dim = q_THD.shape
    num_kv_heads = keys.k_PKSD.shape[1]
    is_paged = keys.block_ids_N is not None
    pipeline = pipeline or pipeline_for(dim, causal, is_paged=is_paged)
    out_THD = torch.empty(q_THD.shape, dtype=out_dtype, device=q_THD.device)
    lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
    if num_tokens == 0:
        return PartialAttention(out_THD, lse_TH)
    rule = causal or Causal()
    num_row_tiles = triton.cdiv(num_tokens, _ROWS * pipeline.num_consumers)
    key_rows = min(keys.block_tokens, pipeline.block_n) if is_paged else pipeline.block_n
    # Where there is nothing to point at, any tensor of the right type does.
    carry_out, carry_lse = carry or PartialAttention(lse_TH, lse_TH)
    prefill_kernel[(_num_programs(pipeline, num_row_tiles * num_heads, q_THD.device),)](
        _descriptor(q_THD, num_tokens, [_ROWS, 1, dim], dim_of_rows=0),
        *(
            _descriptor(x, x.shape[2] if is_paged else keys.num_keys, [1, 1, key_rows, dim])
            for x in (keys.k_PKSD, keys.v_PKSD)
        ),
        keys.block_ids_N if is_paged else lse_TH.view(torch.int32),
        out_THD,
        lse_TH,
        carry_out.contiguous(),
        carry_lse.contiguous(),
        num_row_tiles,
        num_tokens,
        keys.num_keys,
        rule.start,
        num_tokens if rule.split is None else rule.split,
        rule.resume,
        heads_at_once(keys, num_heads),
        scale * math.log2(math.e),
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        BLOCK_M=_ROWS,
        BLOCK_N=pipeline.block_n,
        DIM=dim,
        CONSUMERS=pipeline.num_consumers,
        STAGES=pipeline.num_stages,
        REGISTERS=registers(pipeline),
        BLOCK_TOKENS=keys.block_tokens if is_paged else 0,
        PAGE_BLOCKS=keys.blocks_per_page,
        CAUSAL=causal is not None,
        CARRIED=carry is not None,
        TAKES_TURNS=pipeline.takes_turns,
        HOLDS_QUERIES=pipeline.holds_queries,
        num_warps=4,
    )
    return PartialAttention(out_THD, lse_TH)


def _num_programs(pipeline: Pipeline, num_tiles: int, device: torch.device) -> int:
    return min(num_tiles, num_processors(device)) if pipeline.is_persistent else num_tiles


def registers(pipeline: Pipeline) -> int:
    """Of a consumer's threads: all that are left but the producer's 24."""
    return 240 if pipeline.num_consumers == 2 else 160


def _descriptor(
    x: Tensor, num_rows: int, block_shape: list[int], *, dim_of_rows: int = 2
) -> "TensorDescriptor":
    """What the copy engine reads of x: its first `num_rows` rows, zeros behind them."""
    shape = list(x.shape)
    shape[dim_of_rows] = num_rows
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block_shape))
    return TensorDescriptor(x, shape, list(x.stride()), block_shape, layout)


def _can_be_copied(x: Tensor) -> bool:
    """Whether the copy engine takes its address and strides."""
    return x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])


def heads_at_once(keys: Keys, num_heads: int) -> int:
    """Query heads whose keys and values stay in L2 together: a divisor of all, at least those of
    one KV head."""
    num_kv_heads, dim = keys.k_PKSD.shape[1], keys.k_PKSD.shape[3]
    room = max(1, _L2_KEY_BYTES // (keys.num_keys * dim * 4))
    together = max(n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n <= room)
    return together * (num_heads // num_kv_heads)
