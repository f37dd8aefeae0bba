"""The calls of one model's kernels at many lengths (`launches`): what is compiled for one length
serves the others.

Shapes are those of a model of 8 billion parameters; what arrays hold does not matter, since nothing
runs.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from kvcluster_kernels import (
    column_sums,
    latent_gluon_launch,
    packed_gluon_launch,
    packed_prefill,
    paging,
    prefill_gluon,
    prefill_tl,
)
from kvcluster_kernels.block_bounds import largest_bounds
from kvcluster_kernels.chosen_blocks import Candidates, pick
from kvcluster_kernels.combine_pools import combine_pools
from kvcluster_kernels.decode import ExactPages, decode
from kvcluster_kernels.encode_blocks import Blocks
from kvcluster_kernels.encode_floats import encode_float8
from kvcluster_kernels.encode_integers import IntegerFormat, encode_integers
from kvcluster_kernels.float8_decode import Float8Pages, decode_float8
from kvcluster_kernels.integer_decode import IntegerPages, codes_of, decode_integers
from kvcluster_kernels.merge import merge
from kvcluster_kernels.packed_prefill import History
from kvcluster_kernels.packed_restore import restore
from kvcluster_kernels.paging import Attention, PagedRows, SplitPartials
from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention
from kvcluster_kernels.rotated_decode import RotatedPages
from kvcluster_kernels.rotated_history import RotatedHistory, restore_rotated
from torch import Tensor

from kvcluster.attention.row_tables import RowSpan, paged_rows
from kvcluster.bench.decode_caches import DecodeShape, queries
from kvcluster.bench.latent_caches import LatentFormat, latent_planes
from kvcluster.cache.store import in_blocks

LENGTHS = (1, 2, 15, 16, 17, 64, 129, 1024, 4096, 8191, 12_671, 12_672)
"""One, divisible by 16 or not, with blocks that are full or not, of few splits and many."""
_HEADS, _KV_HEADS, _DIM, _BLOCK, _PAGE_BLOCKS = 32, 8, 128, 64, 16
_PROCESSORS = 132
_SCALE = 0.1
_CPU = torch.device("cpu")
Call = Callable[[int], object]


def _bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _queries(length: int) -> Tensor:
    """A piece of a chunk's rows that begins at an odd one."""
    return _bf16(length + 1, _HEADS, _DIM)[1:]


def _num_blocks(length: int) -> int:
    return -(-length // _BLOCK)


def _ids(length: int) -> Tensor:
    """Behind others of the same tensor."""
    return torch.zeros(_num_blocks(length) + 1, dtype=torch.int32)[1:]


def _in_line(length: int) -> Keys:
    """Keys of a chunk: heads of a row lie together."""
    k_KSD, v_KSD = (_bf16(length + 3, _KV_HEADS, _DIM)[3:].transpose(0, 1) for _ in range(2))
    return Keys.in_line(k_KSD, v_KSD)


def _gathered(length: int) -> Keys:
    """Keys of a history: the tokens of a head lie together."""
    return Keys.in_line(*(_bf16(_KV_HEADS, length, _DIM) for _ in range(2)))


def _in_blocks(length: int) -> Keys:
    pages = _bf16(2, _KV_HEADS, _PAGE_BLOCKS * _BLOCK, _DIM)
    return Keys(pages, pages, length, _ids(length), _BLOCK)


def _whole_blocks(length: int) -> Keys:
    return _in_blocks(_num_blocks(length) * _BLOCK)


def _carry(length: int) -> PartialAttention:
    return PartialAttention(torch.empty(length, _HEADS, _DIM), torch.empty(length, _HEADS))


def _prefill(
    launch: Callable[..., object],
    keys: Callable[[int], Keys],
    length: int,
    *,
    is_causal: bool = False,
    is_carried: bool = False,
) -> object:
    return launch(
        _queries(length),
        keys(length),
        scale=_SCALE,
        causal=Causal(length // 3, length // 2, length) if is_causal else None,
        carry=_carry(length) if is_carried else None,
    )


def _few_rows(launch: Callable[..., object], keys: Callable[[int], Keys], length: int) -> object:
    """Whose keys are shared by many programs."""
    return launch(_queries(40), keys(length), scale=_SCALE)


def _copied(launch: Call, length: int) -> object:
    """As on a GPU whose copy engine fetches keys."""
    with mock.patch.object(prefill_tl, "_can_be_copied", return_value=True):
        return launch(length)


def _rows(length: int) -> PagedRows:
    blocks_B = np.zeros(_num_blocks(length), dtype=np.int64)
    return paged_rows([RowSpan(blocks_B, 0, length, blocks_B)], _CPU)


def _planes(*axes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((2, _PAGE_BLOCKS, _KV_HEADS, *axes), dtype=dtype)


def _integers() -> tuple[IntegerPages, IntegerPages]:
    groups = (
        _planes(1, _DIM, dtype=torch.float16),
        _planes(_DIM // 64, _BLOCK, dtype=torch.float16),
    )
    return (
        IntegerPages(_planes(_BLOCK, _DIM // 2, dtype=torch.uint8), groups[0], groups[0]),
        IntegerPages(_planes(_DIM, _BLOCK // 2, dtype=torch.uint8), groups[1], groups[1]),
    )


def _float8() -> tuple[Float8Pages, Float8Pages]:
    scale = torch.empty((2, _PAGE_BLOCKS, _KV_HEADS))
    keys, values = (
        torch.empty((2, _PAGE_BLOCKS, _KV_HEADS, *axes), dtype=torch.float8_e4m3fn)
        for axes in ((_BLOCK, _DIM), (_DIM, _BLOCK))
    )
    return Float8Pages(keys, scale), Float8Pages(values, scale)


def _rotated() -> tuple[RotatedPages, RotatedPages]:
    scale = _planes(_BLOCK, dtype=torch.float16)
    keys = RotatedPages(_planes(_BLOCK, _DIM // 2, dtype=torch.uint8), scale, None, None)
    values = RotatedPages(_planes(_DIM, _BLOCK // 2, dtype=torch.uint8), scale, None, None)
    return keys, values


def _decode_exact(length: int) -> object:
    pages = _bf16(2, _KV_HEADS, _PAGE_BLOCKS * _BLOCK, _DIM)
    rows = _rows(length)._replace(block_positions_RB=None)
    asked = Attention(_SCALE)
    return decode(_bf16(1, 1, _HEADS, _DIM), ExactPages(pages, pages, _BLOCK), rows, asked)


def _decode_integers(length: int) -> object:
    return decode_integers(
        _bf16(1, 1, _HEADS, _DIM), *_integers(), _rows(length), Attention(_SCALE)
    )


def _decode_float8(length: int) -> object:
    return decode_float8(_bf16(1, 1, _HEADS, _DIM), *_float8(), _rows(length), Attention(_SCALE))


def _decode_on_hopper(length: int) -> object:
    q_RTHD, (keys, values) = _bf16(1, 1, _HEADS, _DIM), _integers()
    codes = codes_of(q_RTHD, keys, values)
    return packed_gluon_launch.splits(
        q_RTHD, keys.planes, values.planes, codes, _rows(length), Attention(_SCALE)
    )


def _decode_latents_on_hopper(length: int) -> object:
    shape = DecodeShape(_HEADS, _KV_HEADS, _DIM, 2 * _BLOCK)
    planes = latent_planes(LatentFormat(0.25, 4, "rotated3"), shape, _CPU)
    asked = Attention(_SCALE)
    return latent_gluon_launch.splits(queries(shape, _CPU), *planes, _rows(length), asked)


def _combine_pools(length: int) -> object:
    pools = [
        SplitPartials(torch.empty(1, 8, splits, 4, _DIM), torch.empty(1, 8, splits, 4))
        for splits in (min(length, 33), min(length, 132))
    ]
    return combine_pools(pools, num_tokens=1, out_dtype=torch.bfloat16)


def _merge(length: int) -> object:
    return merge([_carry(length)] * (1 + length % 13))


def _history(length: int) -> History:
    return History(*_integers(), _ids(length), length)


def _prefill_packed(length: int) -> object:
    return packed_prefill.prefill_packed(_queries(8), _history(length), scale=_SCALE)


def _restore(length: int) -> object:
    return restore(_history(length), _DIM, torch.bfloat16)


def _restore_float8(length: int) -> object:
    history = History(*_float8(), _ids(length), length)
    return restore(history, _DIM, torch.bfloat16)


def _restore_rotated(length: int) -> object:
    history = RotatedHistory(*_rotated(), torch.eye(_DIM), _ids(length), length)
    return restore_rotated(history, torch.bfloat16)


def _encoded(length: int) -> Blocks:
    """Of rows that lie as a cache has them, one block or more."""
    num_blocks = _num_blocks(length)
    x_KSD = _bf16(_KV_HEADS, _PAGE_BLOCKS * _BLOCK + length + _BLOCK, _DIM)
    own_KSD = x_KSD[:, _BLOCK : (num_blocks + 1) * _BLOCK]
    return Blocks(in_blocks(own_KSD, _BLOCK), torch.zeros(num_blocks, dtype=torch.int32))


def _encode_integers(length: int) -> object:
    keys, values = _integers()
    encode_integers(_encoded(length), IntegerFormat(4, 64), keys[:3])
    form = IntegerFormat(4, 64, is_transposed=True)
    return encode_integers(_encoded(length), form, values[:3])


def _encode_float8(length: int) -> object:
    return encode_float8(_encoded(length), _float8()[0])


def _column_sums(length: int) -> object:
    q_THD, lse_TH = _queries(length), torch.empty(length, _HEADS)
    return column_sums.column_sums(
        q_THD, _in_line(length), lse_TH, scale=_SCALE, causal=Causal(length // 3)
    )


def _bounds(length: int) -> object:
    low_KBD, high_KBD = _bf16(2, _KV_HEADS, length, _DIM)
    return largest_bounds(_bf16(1, _HEADS, _DIM), low_KBD, high_KBD, _SCALE)


def _pick(length: int) -> object:
    flags_JB = torch.zeros(3, length, dtype=torch.uint8)
    num_J = torch.zeros(3, dtype=torch.int32)
    return pick(torch.zeros(_HEADS, 3, length), Candidates(flags_JB, num_J))


@triton.jit
def _specialised_kernel(x_ptr, length):
    tl.store(x_ptr, length)


def _specialised(length: int) -> object:
    return _specialised_kernel[(1,)](torch.empty(1), length)


_PIPELINED, _PORTABLE = prefill_gluon.prefill, prefill_tl.prefill
CALLS: dict[str, Call] = {
    "pipelined causal": partial(_prefill, _PIPELINED, _in_line, is_causal=True),
    "pipelined history": partial(_prefill, _PIPELINED, _gathered),
    "pipelined carried": partial(_prefill, _PIPELINED, _gathered, is_carried=True),
    "pipelined blocks": partial(_prefill, _PIPELINED, _whole_blocks),
    "portable causal": partial(_prefill, _PORTABLE, _in_line, is_causal=True),
    "portable history": partial(_prefill, _PORTABLE, _gathered, is_carried=True),
    "portable blocks": partial(_prefill, _PORTABLE, _in_blocks),
    "portable few rows": partial(_few_rows, _PORTABLE, _in_blocks),
    "copied few rows": partial(_copied, partial(_few_rows, _PORTABLE, _gathered)),
    "exact decode": _decode_exact,
    "integer decode": _decode_integers,
    "float8 decode": _decode_float8,
    "integer decode on Hopper": _decode_on_hopper,
    "latent decode on Hopper": _decode_latents_on_hopper,
    "combined pools": _combine_pools,
    "merge": _merge,
    "packed prefill": _prefill_packed,
    "restored integers": _restore,
    "restored float8": _restore_float8,
    "restored rotated": _restore_rotated,
    "encoded integers": _encode_integers,
    "encoded float8": _encode_float8,
    "column sums": _column_sums,
    "bounds": _bounds,
    "pick": _pick,
    "specialised": _specialised,
}
"""By name, each for any length."""


def _on_hopper(call: Call, length: int) -> None:
    """Split as on a GPU of so many processors."""
    with ExitStack() as stack:
        for module in (column_sums, packed_prefill, paging, prefill_gluon, prefill_tl):
            patch = mock.patch.object(module, "num_processors", return_value=_PROCESSORS)
            stack.enter_context(patch)
        call(length)


def name_of(call: str, length: int) -> str:
    """Of a launch."""
    return f"{call}, {length}"


LAUNCHES: dict[str, Callable[[], object]] = {
    name_of(name, length): partial(_on_hopper, call, length)
    for name, call in CALLS.items()
    for length in LENGTHS
}
