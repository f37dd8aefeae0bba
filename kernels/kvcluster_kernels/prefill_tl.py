"""Launches the portable prefill kernel.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension, Z splits.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvcluster_kernels.merge import merge
from kvcluster_kernels.paging import is_interpreted, num_processors
from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention, check_arguments
from kvcluster_kernels.prefill_tl_kernel import prefill_kernel


class Tiles(NamedTuple):
    """How a prefill is cut for the processor."""

    block_m: int
    """Rows of a program."""
    block_n: int
    """Keys of a step."""
    num_warps: int
    num_stages: int
    """Steps whose keys are in shared memory at a time."""
    is_ahead: bool = True
    """Products of the next keys are asked for before the softmax of the present ones."""
    is_copied: bool = False
    """Keys, which are in line, are fetched by the GPU's copy engine."""


_TILES = {
    # The wider head size of keys and values, and all sizes below it. Of 64, two programs fit a
    # processor, and one's softmax runs beside the other one's products.
    64: Tiles(128, 64, 8, 3, is_ahead=False),
    128: Tiles(128, 64, 8, 3),
    # Logits of 64 keys beside outputs of this size are more than there are registers.
    256: Tiles(128, 32, 8, 2),
}
"""For 16-bit numbers on Hopper; chosen with `kvcluster bench kernels`."""
_PAGED_TILES = {64: _TILES[64], 128: Tiles(64, 64, 4, 3, is_ahead=False), 256: _TILES[256]}
"""The same where keys lie in blocks, which are found one step later: programs that wait for that
are better small and several."""
_COPIED_TILES = {
    64: Tiles(64, 128, 4, 2, is_ahead=False, is_copied=True),
    128: Tiles(128, 64, 8, 3, is_copied=True),
}
"""The same where keys are fetched by the copy engine, by the exact size of both."""
_COPY_CAPABILITY = (9, 0)
_FLOAT32_TILES = Tiles(64, 32, 4, 1, is_ahead=False)
"""The matrix unit does not multiply these."""
_MIN_SPLIT_KEYS = 1024
_MAX_SPLITS = 32


def tiles_for(
    dim: int, *, num_rows: int = 1 << 30, block_tokens: int = 0, is_copied: bool = False
) -> Tiles:
    """The tiles of a call in 16-bit numbers: `dim` is the wider head size of keys and values,
    `num_rows` are the rows of a KV head, `block_tokens` the keys of a block, 0 if in line;
    `is_copied`: the copy engine takes them."""
    sizes = _COPIED_TILES if is_copied else _PAGED_TILES if block_tokens else _TILES
    tiles = next(tiles for size, tiles in sizes.items() if dim <= size)
    if block_tokens:
        # Keys of one block are found by one look at the table.
        tiles = tiles._replace(block_n=max(16, min(tiles.block_n, block_tokens)))
    if num_rows <= 64:
        # The matrix unit's own tile has 64 rows, one group of four warps.
        tiles = tiles._replace(block_m=64, num_warps=4)
    return tiles


def prefill(
    q_THD: Tensor,
    keys: Keys,
    *,
    scale: float,
    causal: Causal | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    carry: PartialAttention | None = None,
    out_dtype: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
    num_splits: int | None = None,
) -> PartialAttention:
    """As `prefill_reference.prefill`, in one kernel; on a CPU in Triton's interpreter.

    `num_splits`: programs that share the keys of a row, whose partials are merged afterwards;
    None: as many as keep the processor busy.

    Raises: ValueError when shapes do not fit.
    """
    check_arguments(q_THD, keys, scale, causal, carry)
    num_tokens, num_heads, key_dim = q_THD.shape
    num_kv_heads, value_dim = keys.k_PKSD.shape[1], keys.v_PKSD.shape[3]
    num_rows = num_tokens * (num_heads // num_kv_heads)
    if tiles is None:
        tiles = _tiles(q_THD, keys, num_rows)
        if causal is not None and causal.bound is not None and not causal.bound.is_before:
            # Its masks take registers, and rows see few keys: those of some blocks.
            tiles = tiles._replace(block_n=min(tiles.block_n, 64))
    num_programs = triton.cdiv(num_rows, tiles.block_m) * num_kv_heads
    if num_splits is None:
        num_splits = _splits(q_THD.device, num_programs, keys.num_keys)
    # Wide heads leave no registers for another partial beside their own.
    is_whole = num_splits == 1 and (max(key_dim, value_dim) <= 128 or carry is None)
    partial_dtype = out_dtype if is_whole else torch.float32
    split = PartialAttention(
        q_THD.new_empty((num_splits, num_tokens, num_heads, value_dim), dtype=partial_dtype),
        q_THD.new_empty((num_splits, num_tokens, num_heads), dtype=torch.float32),
    )
    if num_tokens:
        rules = _Rules(scale, causal, softcap, *((sinks_H, carry) if is_whole else (None, None)))
        _launch((num_programs, num_splits), q_THD, keys, rules, tiles, split)
    if is_whole or not num_tokens:
        return PartialAttention(*(plane[0] for plane in split))
    partials = [*map(PartialAttention, *split), *([carry] if carry else [])]
    return merge(partials, sinks_H=sinks_H, out_dtype=out_dtype)


class _Rules(NamedTuple):
    """What a program folds in beside the keys."""

    scale: float
    causal: Causal | None
    softcap: float | None
    sinks_H: Tensor | None
    carry: PartialAttention | None


def _launch(
    grid: tuple[int, int],
    q_THD: Tensor,
    keys: Keys,
    rules: _Rules,
    tiles: Tiles,
    split: PartialAttention,
) -> None:
    """Fill `split`, planes with the splits in front."""
    num_tokens, num_heads, key_dim = q_THD.shape
    num_kv_heads, value_dim = keys.k_PKSD.shape[1], keys.v_PKSD.shape[3]
    softcap, carry, rule = rules.softcap, rules.carry, rules.causal or Causal()
    bound = rule.bound
    scale2 = rules.scale * math.log2(math.e)
    is_float32, is_emulated = q_THD.dtype == torch.float32, is_interpreted(prefill_kernel)
    prefill_kernel[grid](
        q_THD,
        *_sources(keys, tiles),
        *split,
        keys.block_ids_N,
        carry and carry.out_THD.contiguous(),
        carry and carry.lse_TH.contiguous(),
        None if rules.sinks_H is None else rules.sinks_H.float(),
        num_tokens,
        keys.num_keys,
        rule.start,
        num_tokens if rule.split is None else rule.split,
        rule.resume,
        rule.window or 0,
        bound.lag if bound else 0,
        2.0 * scale2 / softcap if softcap is not None else scale2,
        softcap * math.log2(math.e) if softcap is not None else 1.0,
        *q_THD.stride()[:2],
        *keys.k_PKSD.stride()[:3],
        *keys.v_PKSD.stride()[:3],
        GROUP=num_heads // num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        IS_SPLIT=grid[1] > 1,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        PADDED_KEY_DIM=max(16, triton.next_power_of_2(key_dim)),
        PADDED_VALUE_DIM=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_TOKENS=0 if keys.block_ids_N is None else keys.block_tokens,
        PAGE_BLOCKS=keys.blocks_per_page,
        # With more rules, the assembler takes registers of products that are under way.
        AHEAD=tiles.is_ahead and rule.window is None and bound is None,
        CAUSAL=rules.causal is not None,
        WINDOWED=rule.window is not None,
        BOUND_TOKENS=bound.block_tokens if bound else 0,
        IS_BEFORE=bound is not None and bound.is_before,
        SOFTCAPPED=softcap is not None,
        CARRIED=carry is not None,
        SINKS=rules.sinks_H is not None,
        COPIED=tiles.is_copied,
        WHOLE=rules.causal is None and keys.num_keys % tiles.block_n == 0,
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        UPCAST=is_emulated and not is_float32,
        PRECISION="ieee" if is_emulated or is_float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _sources(keys: Keys, tiles: Tiles) -> tuple[object, object]:
    """What programs read keys and values from."""
    if not tiles.is_copied:
        return keys.k_PKSD, keys.v_PKSD
    k_KSD, v_KSD = (x[0, :, : keys.num_keys] for x in (keys.k_PKSD, keys.v_PKSD))
    return _described(k_KSD, tiles.block_n), _described(v_KSD, tiles.block_n)


def _described(x_KSD: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x_KSD, [1, rows, x_KSD.shape[2]])


def _can_be_copied(q_THD: Tensor, keys: Keys) -> bool:
    """Whether the GPU has a copy engine that takes these keys."""
    return (
        q_THD.is_cuda
        and torch.cuda.get_device_capability(q_THD.device) >= _COPY_CAPABILITY
        and keys.block_ids_N is None
        and keys.num_keys > 0
        and all(_is_aligned(x) for x in (keys.k_PKSD, keys.v_PKSD))
    )


def _is_aligned(x: Tensor) -> bool:
    dim = x.shape[3]
    return (
        dim in _COPIED_TILES
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in x.stride()[1:-1])
    )


def _tiles(q_THD: Tensor, keys: Keys, num_rows: int) -> Tiles:
    if q_THD.dtype == torch.float32:
        return _FLOAT32_TILES
    return tiles_for(
        max(q_THD.shape[2], keys.v_PKSD.shape[3]),
        num_rows=num_rows,
        block_tokens=0 if keys.block_ids_N is None else keys.block_tokens,
        is_copied=_can_be_copied(q_THD, keys),
    )


def _splits(device: torch.device, num_programs: int, num_keys: int) -> int:
    """Programs for a row of tiles, such that all multiprocessors have work."""
    if num_programs == 0:
        return 1
    wanted = num_processors(device) // num_programs
    return max(1, min(wanted, num_keys // _MIN_SPLIT_KEYS, _MAX_SPLITS))
