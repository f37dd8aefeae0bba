"""Histories of rotated vectors for prefill: levels times their scales, in line, as rotated.

Dot products do not change where queries are rotated as keys were, so that keys stay as they are and
queries are rotated; weighted sums of values are rotated back once. A mean that keys have beside
their levels is rotated for each block.

Shape letters: those of `packed_prefill.py`; R rows of a tile, C bytes of a row.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, dtype

from kvcluster_kernels.codes import has_assembly, num_fields, row_bytes
from kvcluster_kernels.levels import unpack_levels, unpack_levels3
from kvcluster_kernels.packed_launch import page_strides
from kvcluster_kernels.packed_tiles import side_by_side
from kvcluster_kernels.prefill_arguments import Keys
from kvcluster_kernels.rotated_decode import RotatedPages, code_bits
from kvcluster_kernels.softmax import append

_NUM_WARPS = 8


class RotatedHistory(NamedTuple):
    """Encoded blocks of one sequence, as the cache stores them. Values are transposed."""

    keys: RotatedPages
    values: RotatedPages
    """Without a mean."""
    rotation_DD: Tensor
    """float32, of keys and values both."""
    blocks_N: Tensor
    """int32: the ids of the sequence's blocks in the pages, in order."""
    num_keys: int
    """Tokens of these blocks; of the last one, those behind it are not read."""

    @property
    def block_tokens(self) -> int:
        return int(self.keys.scale.shape[3])

    @property
    def num_kv_heads(self) -> int:
        return int(self.keys.scale.shape[2])

    @property
    def value_dim(self) -> int:
        return int(self.rotation_DD.shape[0])

    def part(self, first: int, end: int, num_keys: int) -> "RotatedHistory":
        """Of some blocks."""
        return self._replace(blocks_N=self.blocks_N[first:end], num_keys=num_keys)


def check_rotated(q_THD: Tensor, history: RotatedHistory) -> None:
    """Raises: ValueError when shapes do not fit, with what was expected."""
    num_heads, dim = q_THD.shape[1:]
    if num_heads % history.num_kv_heads or history.rotation_DD.shape != (dim, dim):
        raise ValueError(
            f"rotated prefill: {num_heads} query heads of {dim}, {history.num_kv_heads} KV heads, "
            f"a rotation {tuple(history.rotation_DD.shape)}"
        )
    if history.num_keys > len(history.blocks_N) * history.block_tokens:
        raise ValueError(f"rotated prefill: {history.num_keys} keys do not fit into the blocks")
    if code_bits(history.values, history.block_tokens) != code_bits(history.keys, dim):
        raise ValueError("rotated prefill: want keys and values of as many bits")
    if history.values.mean is not None:
        raise ValueError("rotated prefill: values have no mean")


def restore_rotated(history: RotatedHistory, numbers: dtype) -> Keys:
    """All keys and values of the history before the rotation back, in new memory; on a CPU in
    Triton's interpreter. `packed_plain.restore_rotated_keys` and `restore_rotated_values` with the
    identity for a rotation are the definition, but for the mean, which is rotated.

    Raises: ValueError for planes that do not go together.
    """
    blocks_N = history.blocks_N[: triton.cdiv(history.num_keys, history.block_tokens)]
    num_slots = len(blocks_N) * history.block_tokens
    shape = (history.num_kv_heads, num_slots, history.value_dim)
    k_KSD, v_KSD = (blocks_N.new_empty(shape, dtype=numbers) for _ in range(2))
    mean_NKD = None
    if history.keys.mean is not None:
        ids_N, per_page = blocks_N.long(), history.keys.mean.shape[1]
        mean_NKD = history.keys.mean[ids_N // per_page, ids_N % per_page].float()
        mean_NKD = (mean_NKD @ history.rotation_DD.T).contiguous()
    _launch(history.keys, blocks_N, k_KSD, mean_NKD, is_transposed=False)
    _launch(history.values, blocks_N, v_KSD, None, is_transposed=True)
    return Keys(k_KSD[None], v_KSD[None], history.num_keys)


def _launch(
    pages: RotatedPages,
    blocks_N: Tensor,
    x_KSD: Tensor,
    mean_NKD: Tensor | None,
    *,
    is_transposed: bool,
) -> None:
    if not len(blocks_N):
        return
    num_heads, num_slots, dim = x_KSD.shape
    block_tokens = num_slots // len(blocks_N)
    planes = (pages.codes, pages.codes if pages.high is None else pages.high, pages.scale)
    _level_kernel[(len(blocks_N), num_heads)](
        *planes,
        pages.scale if mean_NKD is None else mean_NKD,
        blocks_N,
        x_KSD,
        num_slots,
        *page_strides(planes),
        BLOCK_TOKENS=block_tokens,
        PAGE_BLOCKS=planes[0].shape[1],
        DIM=dim,
        BITS=code_bits(pages, block_tokens if is_transposed else dim),
        HAS_MEAN=mean_NKD is not None,
        IS_TRANSPOSED=is_transposed,
        IS_GPU=has_assembly(_level_kernel),
        num_warps=_NUM_WARPS,
    )


@triton.jit(do_not_specialize=("num_slots",), do_not_specialize_on_alignment=("blocks_ptr",))
def _level_kernel(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_slots: tl.tensor,
    stride_codes: tl.tensor,
    stride_high: tl.tensor,
    stride_scale: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    ROWS: tl.constexpr = DIM if IS_TRANSPOSED else BLOCK_TOKENS
    LENGTH: tl.constexpr = BLOCK_TOKENS if IS_TRANSPOSED else DIM
    C: tl.constexpr = row_bytes(LENGTH, BITS)
    index, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    block = tl.load(blocks_ptr + index)
    page = (block // PAGE_BLOCKS).to(tl.int64)
    place = block % PAGE_BLOCKS * num_heads + head
    rows = tl.arange(0, ROWS)
    bytes_ = tl.arange(0, C)
    codes_ptr += page * stride_codes + place * (ROWS * C)
    packed_RC = tl.load(codes_ptr + rows[:, None] * C + bytes_[None, :])
    if BITS == 3:
        H: tl.constexpr = LENGTH // 8
        high_ptr += page * stride_high + place * (ROWS * H)
        third_RC = tl.load(high_ptr + rows[:, None] * H + (bytes_ % H)[None, :])
        half_RC = tl.zeros([ROWS, C], tl.int32) + (bytes_ // H)[None, :]
        fields = unpack_levels3(packed_RC, third_RC, half_RC, IS_GPU)
    else:
        fields = unpack_levels(packed_RC, BITS, IS_GPU)
    scale_ptr += page * stride_scale + place * BLOCK_TOKENS
    mean_ptr += (index * num_heads + head) * DIM
    tiles = ()
    for field in tl.static_range(num_fields(BITS)):
        columns = field * C + bytes_
        x_RC = fields[field].to(tl.float32)
        if IS_TRANSPOSED:
            x_RC = x_RC * tl.load(scale_ptr + columns).to(tl.float32)[None, :]
        else:
            x_RC = x_RC * tl.load(scale_ptr + rows).to(tl.float32)[:, None]
        if HAS_MEAN:
            x_RC = x_RC + tl.load(mean_ptr + columns)[None, :]
        tiles = append(tiles, x_RC)
    x_SD = side_by_side(tiles)
    if IS_TRANSPOSED:
        x_SD = tl.trans(x_SD)
    slots_S = head.to(tl.int64) * num_slots + index * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    pointers = x_ptr + slots_S[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(pointers, x_SD.to(x_ptr.dtype.element_ty))
