"""Prefill attention of query tokens over the encoded blocks of a sequence's history, which all of
them see: read as they are stored, or restored once and then attended to.

Shape letters: T query tokens, H query heads, K KV heads, D head dimension, S tokens of a block, N
blocks of a sequence, Z splits.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvcluster_kernels.codes import has_assembly, num_fields, row_bytes
from kvcluster_kernels.float8_decode import Float8Pages
from kvcluster_kernels.integer_decode import IntegerPages, code_bits
from kvcluster_kernels.merge import merge
from kvcluster_kernels.packed_launch import page_strides
from kvcluster_kernels.packed_prefill_kernel import packed_prefill_kernel
from kvcluster_kernels.paging import num_processors
from kvcluster_kernels.prefill_arguments import MAX_HEAD_DIM, PartialAttention

_MIN_SPLIT_BLOCKS = 16
_MAX_SPLITS = 32
_LEAST_TOKENS = 16
"""Of a block: a matrix product is of 16 numbers at least."""


class History(NamedTuple):
    """Encoded blocks of one sequence, as the cache stores them. Values are transposed."""

    keys: IntegerPages | Float8Pages
    values: IntegerPages | Float8Pages
    """Of the same kind as the keys."""
    blocks_N: Tensor
    """int32: the ids of the sequence's blocks in the pages, in order."""
    num_keys: int
    """Tokens of these blocks; of the last one, those behind it are not read."""

    @property
    def block_tokens(self) -> int:
        return int(_stored(self.keys).shape[3])

    @property
    def num_kv_heads(self) -> int:
        return int(_stored(self.keys).shape[2])

    @property
    def value_dim(self) -> int:
        return int(_stored(self.values).shape[3])

    def part(self, first: int, end: int, num_keys: int) -> "History":
        """Of some blocks."""
        return self._replace(blocks_N=self.blocks_N[first:end], num_keys=num_keys)


class PackedTiles(NamedTuple):
    """How a prefill over encoded blocks is cut for the processor. Changes the speed alone."""

    block_m: int = 64
    """Rows of a program."""
    num_warps: int = 4
    num_stages: int = 3
    """Blocks whose bytes are in shared memory at a time."""


def prefill_packed(
    q_THD: Tensor,
    history: History,
    *,
    scale: float,
    carry: PartialAttention | None = None,
    out_dtype: torch.dtype = torch.float32,
    tiles: PackedTiles | None = None,
    num_splits: int | None = None,
) -> PartialAttention:
    """softmax(scale * q k^T) v over all keys with its LSE, merged with `carry`, in one kernel that
    reads the blocks as they are stored; on a CPU in Triton's interpreter.
    `packed_prefill_reference.prefill_packed` is the definition.

    `num_splits`: programs that share the blocks of a row, whose partials are merged afterwards;
    None: as many as keep the processor busy.

    Raises: ValueError when shapes do not fit.
    """
    check_history(q_THD, history, scale, carry)
    if has_thirds(history):
        raise ValueError("packed prefill: codes of 3 bits are restored (`packed_history`)")
    num_tokens, num_heads, _ = q_THD.shape
    num_rows = num_tokens * (num_heads // history.num_kv_heads)
    tiles = tiles or PackedTiles()
    num_programs = triton.cdiv(num_rows, tiles.block_m) * history.num_kv_heads
    if num_splits is None:
        num_splits = _splits(q_THD.device, num_programs, history)
    is_whole = num_splits == 1
    shape = (num_splits, num_tokens, num_heads)
    split = PartialAttention(
        q_THD.new_empty(
            (*shape, history.value_dim), dtype=out_dtype if is_whole else torch.float32
        ),
        q_THD.new_empty(shape, dtype=torch.float32),
    )
    if num_tokens:
        grid = (num_programs, num_splits)
        _launch(grid, q_THD, history, scale, carry if is_whole else None, tiles, split)
    if is_whole or not num_tokens:
        return PartialAttention(*(plane[0] for plane in split))
    partials = [*map(PartialAttention, *split), *([carry] if carry else [])]
    return merge(partials, out_dtype=out_dtype)


class Format(NamedTuple):
    """What a kernel is compiled for, of keys and values."""

    k_bits: int
    """0: floats."""
    v_bits: int
    k_groups: int
    v_groups: int
    scale_bits: int


def format_of(history: History, key_dim: int) -> Format:
    """Raises: ValueError where keys and values are not of one kind, or of no width that is
    known."""
    keys, values = history.keys, history.values
    if isinstance(keys, Float8Pages) and isinstance(values, Float8Pages):
        return Format(0, 0, 1, 1, 16)
    if not isinstance(keys, IntegerPages) or not isinstance(values, IntegerPages):
        raise ValueError("packed prefill: want keys and values that are both integers or floats")
    if (keys.unit is None) != (values.unit is None):
        raise ValueError("packed prefill: want keys and values with scales of as many bits")
    return Format(
        code_bits(keys, key_dim),
        code_bits(values, history.block_tokens),
        int(keys.scale.shape[3]),
        int(values.scale.shape[3]),
        16 if keys.unit is None else 8,
    )


def has_thirds(history: History) -> bool:
    """Whether there are codes of 3 bits, which are two planes."""
    return any(
        isinstance(pages, IntegerPages) and pages.high is not None
        for pages in (history.keys, history.values)
    )


def check_history(
    q_THD: Tensor, history: History, scale: float, carry: PartialAttention | None
) -> None:
    """Raises: ValueError when shapes do not fit, with what was expected."""
    num_tokens, num_heads, dim = q_THD.shape
    if history.num_kv_heads == 0 or num_heads % history.num_kv_heads:
        raise ValueError(f"packed prefill: {num_heads} query, {history.num_kv_heads} KV heads")
    if not 0 < max(dim, history.value_dim) <= MAX_HEAD_DIM:
        raise ValueError(f"packed prefill: heads of {dim} and {history.value_dim} channels")
    block_tokens = history.block_tokens
    if block_tokens < _LEAST_TOKENS or block_tokens & (block_tokens - 1):
        raise ValueError(f"packed prefill: blocks of {block_tokens} tokens: want a power of two")
    if history.num_keys > history.blocks_N.numel() * block_tokens:
        raise ValueError(f"packed prefill: {history.num_keys} keys do not fit into the blocks")
    if isinstance(history.keys, Float8Pages) and history.keys.values.shape[4] != dim:
        raise ValueError(f"packed prefill: queries of {dim}, keys of {history.keys.values.shape}")
    if not scale > 0:
        raise ValueError(f"packed prefill: want a scale above 0, got {scale}")
    if q_THD.numel() and q_THD.stride(2) != 1:
        raise ValueError("packed prefill: want the numbers of a head one after another")
    if carry is not None and carry.out_THD.shape != (num_tokens, num_heads, history.value_dim):
        raise ValueError(f"packed prefill: carry has shape {tuple(carry.out_THD.shape)}")
    format_of(history, dim)


def planes_of(pages: IntegerPages | Float8Pages) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, zero and unit; where there is nothing to point at, the scale again."""
    if isinstance(pages, Float8Pages):
        return pages.values, pages.scale, pages.scale, pages.scale
    unit = pages.scale if pages.unit is None else pages.unit
    return pages.codes, pages.scale, pages.zero, unit


def padded_columns(length: int, bits: int) -> int:
    """Of a tile of rows of so many numbers."""
    if bits == 0:
        return int(triton.next_power_of_2(length))
    return int(triton.next_power_of_2(row_bytes(length, bits))) * int(num_fields(bits))


def padded_rows(rows: int, groups: int) -> int:
    """Of a tile of so many rows."""
    return int(triton.next_power_of_2(groups) * triton.next_power_of_2(rows // groups))


def _launch(
    grid: tuple[int, int],
    q_THD: Tensor,
    history: History,
    scale: float,
    carry: PartialAttention | None,
    tiles: PackedTiles,
    split: PartialAttention,
) -> None:
    """Fill `split`, planes with the splits in front."""
    num_tokens, num_heads, key_dim = q_THD.shape
    form = format_of(history, key_dim)
    keys, values = planes_of(history.keys), planes_of(history.values)
    packed_prefill_kernel[grid](
        q_THD,
        *keys,
        *values,
        history.blocks_N,
        *split,
        # Where there is nothing to point at, any tensor of the right type does.
        *((x.contiguous() for x in carry) if carry else (split.lse_TH, split.lse_TH)),
        num_tokens,
        history.num_keys,
        scale * math.log2(math.e),
        *q_THD.stride()[:2],
        *page_strides(keys),
        *page_strides(values),
        GROUP=num_heads // history.num_kv_heads,
        NUM_KV_HEADS=history.num_kv_heads,
        BLOCK_M=tiles.block_m,
        BLOCK_TOKENS=history.block_tokens,
        PAGE_BLOCKS=keys[0].shape[1],
        KEY_DIM=key_dim,
        VALUE_DIM=history.value_dim,
        K_BITS=form.k_bits,
        V_BITS=form.v_bits,
        K_GROUPS=form.k_groups,
        V_GROUPS=form.v_groups,
        SCALE_BITS=form.scale_bits,
        K_COLUMNS=padded_columns(key_dim, form.k_bits),
        V_ROWS=padded_rows(history.value_dim, form.v_groups),
        CARRIED=carry is not None,
        IS_GPU=has_assembly(packed_prefill_kernel),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _splits(device: torch.device, num_programs: int, history: History) -> int:
    """Programs for a row of tiles, such that all multiprocessors have work."""
    if num_programs == 0:
        return 1
    num_blocks = history.num_keys // history.block_tokens
    wanted = num_processors(device) // num_programs
    return max(1, min(wanted, num_blocks // _MIN_SPLIT_BLOCKS, _MAX_SPLITS))


def _stored(pages: IntegerPages | Float8Pages) -> Tensor:
    return pages.values if isinstance(pages, Float8Pages) else pages.codes
