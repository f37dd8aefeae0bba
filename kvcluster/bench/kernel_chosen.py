"""Suite `chosen` of `kvcluster bench kernels`: what choosing keys costs, and what it saves.

Column sums beside attention over as many keys, and prefill over lists of blocks beside attention
over all of them.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

import torch
from kvcluster_kernels.column_sums import column_sums
from kvcluster_kernels.prefill_arguments import Keys
from kvcluster_kernels.prefill_tl import prefill
from kvcluster_kernels.sparse_prefill import SparseTiles, TileBlocks, sparse_prefill
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.report import Measurement

_GPU: Final = torch.device("cuda")
_HEADS: Final = 32
_KV_HEADS: Final = 8
_BLOCK_TOKENS: Final = 64
_TILE_TOKENS: Final = 64
_SHARES: Final = (0.25, 0.0625)
"""Of the blocks that a list has."""


class ChosenShape(NamedTuple):
    """A chunk of queries over a history, all of it visible."""

    dim: int
    num_tokens: int
    num_keys: int

    def __str__(self) -> str:
        keys = f"{self.num_keys >> 10}K"
        return f"D{self.dim} {_HEADS}/{_KV_HEADS} {self.num_tokens} queries over {keys}"

    @property
    def operations(self) -> int:
        """Of scores and weighted sums."""
        return 4 * self.num_tokens * self.num_keys * _HEADS * self.dim


SHAPES: Final = (
    ChosenShape(128, 8192, 1 << 15),
    ChosenShape(128, 512, 1 << 17),
    ChosenShape(64, 8192, 1 << 15),
)


TILES: Final = (
    SparseTiles(128, 4),
    SparseTiles(128, 4, is_ahead=True),
    SparseTiles(128, 8),
    SparseTiles(128, 8, is_ahead=True),
    SparseTiles(64, 4),
    SparseTiles(64, 4, is_ahead=True),
    SparseTiles(64, 8),
)
"""Of lists for KV heads, with variants."""


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:
    """Attention first, which the others are compared with."""
    for shape in SHAPES:
        if timer.is_over:
            return
        q_THD, keys = drawn(shape)
        scale = shape.dim**-0.5
        attend = partial(prefill, q_THD, keys, scale=scale)
        whole = _taken(timer, f"{shape} attention", attend)
        if whole is None:
            continue
        yield from _times(f"{shape} attention", whole, shape.operations)
        lse_TH = attend().lse_TH
        sums = partial(column_sums, q_THD, keys, lse_TH, scale=scale)
        yield from _beside(timer, f"{shape} column sums", sums, whole, shape.operations // 2)
        for share in _SHARES:
            chosen = drawn_lists(shape, share)
            read = partial(sparse_prefill, q_THD, keys, chosen, scale=scale)
            operations = int(shape.operations * share)
            title = f"{shape} {share:g} of blocks"
            yield from _beside(timer, title, read, whole, operations)
            for tiles in TILES if with_variants else ():
                tiled = partial(read, tiles=tiles)
                yield from _beside(timer, f"{title} {_named(tiles)}", tiled, whole, operations)


def _named(tiles: SparseTiles) -> str:
    ahead = " ahead" if tiles.is_ahead else ""
    return f"in tiles of {tiles.block_m}, {tiles.num_stages} stages{ahead}"


def drawn(shape: ChosenShape) -> tuple[Tensor, Keys]:
    """Random queries, and keys and values in blocks in any order."""
    size = (1, _KV_HEADS, shape.num_keys, shape.dim)
    k_1KSD, v_1KSD = (torch.randn(size, dtype=torch.bfloat16, device=_GPU) for _ in range(2))
    q_size = (shape.num_tokens, _HEADS, shape.dim)
    q_THD = torch.randn(q_size, dtype=torch.bfloat16, device=_GPU)
    order = torch.randperm(shape.num_keys // _BLOCK_TOKENS, device=_GPU).to(torch.int32)
    return q_THD, Keys(k_1KSD, v_1KSD, shape.num_keys, order, _BLOCK_TOKENS)


def drawn_lists(shape: ChosenShape, share: float) -> TileBlocks:
    """As many blocks for each tile and KV head, ascending, other ones for each."""
    num_blocks = shape.num_keys // _BLOCK_TOKENS
    tiles = (_KV_HEADS, -(-shape.num_tokens // _TILE_TOKENS))
    length = int(num_blocks * share)
    order = torch.rand((*tiles, num_blocks), device=_GPU).argsort(dim=-1)[..., :length]
    counts_GU = torch.full(tiles, length, dtype=torch.int32, device=_GPU)
    lists_GUL = order.sort(dim=-1).values.to(torch.int32).contiguous()
    return TileBlocks(lists_GUL, counts_GU, _TILE_TOKENS, _BLOCK_TOKENS)


def _beside(
    timer: KernelTimer, title: str, call: Callable[[], object], whole: float, operations: int
) -> Iterator[Measurement]:
    taken = _taken(timer, title, call)
    if taken is not None:
        yield from _times(title, taken, operations)
        yield Measurement(name=f"{title} beside attention", value=taken / whole, unit="x")


def _times(title: str, taken: float, operations: int) -> Iterator[Measurement]:
    yield Measurement(name=title, value=taken, unit="us")
    yield Measurement(name=f"{title} speed", value=operations / taken * 1e-6, unit="TFLOP/s")


def _taken(timer: KernelTimer, title: str, call: Callable[[], object]) -> float | None:
    """Microseconds; None where time is over or the kernel cannot run here."""
    if timer.is_over:
        return None
    try:
        return timer.microseconds(call, repeats=7)
    except (RuntimeError, CompilationError, OutOfResources) as error:
        sys.stderr.write(f"{title}: {type(error).__name__}: {str(error)[:300]}\n")
        return None
