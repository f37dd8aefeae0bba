"""Suite `selected` of `kvcluster bench kernels`: what a sequence gains that chooses what it reads.

Decode of `quest` beside decode over all keys, step by step: bounds of blocks, tables of the best,
attention over these. Prefill of `block_sparse` and of `estimated` beside attention over all keys
that are visible, by the kernel that serves it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

import torch
from kvcluster_kernels import prefill_gluon, prefill_tl
from kvcluster_kernels.block_bounds import largest_bounds
from kvcluster_kernels.block_lists import one_head_pages, one_head_planes
from kvcluster_kernels.chosen_blocks import (
    ALWAYS,
    ENCODED,
    EXACT,
    FREE,
    BlockLists,
    Candidates,
    Pools,
    lists,
    pick,
    row_tables,
)
from kvcluster_kernels.decode import decode
from kvcluster_kernels.integer_decode import IntegerPages, decode_integers
from kvcluster_kernels.merge import merge
from kvcluster_kernels.paging import Attention, PagedRows
from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention
from kvcluster_kernels.sparse_prefill import TileBlocks, sparse_prefill
from torch import Tensor

from kvcluster.attention.kernel_choice import Prefill, prefill_choice
from kvcluster.bench.decode_caches import (
    BLOCK_SIZE,
    CACHES,
    DecodeShape,
    exact_pages,
    integer_pages,
    queries,
)
from kvcluster.bench.kernel_chosen import ChosenShape, drawn
from kvcluster.bench.kernel_failures import FAILURES, report_failure
from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.report import Measurement
from kvcluster.selection.base import BlockSelection, query_blocks, readable
from kvcluster.selection.block_sparse import BlockSparse
from kvcluster.selection.estimated import Estimated
from kvcluster.types import PAGE_BLOCKS

_GPU: Final = torch.device("cuda")
_READ_TOKENS: Final = 4096
_SINKS: Final = 1
_LOCAL: Final = 2
"""First and latest blocks, which are always read; with a codec, they are exact."""
DECODES: Final = tuple(DecodeShape(32, 8, 128, num_keys) for num_keys in (1 << 17, 1 << 20))
PREFILLS: Final = (ChosenShape(128, 8192, 1 << 15), ChosenShape(128, 8192, 1 << 17))
METHODS: Final[dict[str, BlockSelection]] = {
    "block_sparse:local=8,stride=16": BlockSparse(local=8, stride=16, block_size=BLOCK_SIZE),
    "estimated:share=0.25": Estimated(share=0.25, block_size=BLOCK_SIZE),
    "estimated:share=0.0625": Estimated(share=0.0625, block_size=BLOCK_SIZE),
}

_READ: Final = "read"
Steps = dict[str, Callable[[], object]]
"""By name; the last one is all of them."""


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:  # noqa: ARG001
    """Attention over all keys first, which the others are compared with."""
    for decoded in DECODES:
        for codec in DECODE_STEPS:
            if not timer.is_over:
                yield from _decode(timer, decoded, codec)
    for shape in PREFILLS:
        if not timer.is_over:
            yield from _prefill(timer, shape)


def _decode(timer: KernelTimer, shape: DecodeShape, codec: str) -> Iterator[Measurement]:
    title, q_RTHD = f"{shape} {codec}", queries(shape, _GPU)
    all_keys = CACHES[codec](shape, q_RTHD).decode
    whole = _taken(timer, f"{title} all keys", partial(all_keys, None))
    if whole is not None:
        yield Measurement(name=f"{title} all keys", value=whole, unit="us")
        steps = DECODE_STEPS[codec](shape, q_RTHD)
        yield from _steps(timer, f"{title} quest {_READ_TOKENS}", steps, whole)


def _prefill(timer: KernelTimer, shape: ChosenShape) -> Iterator[Measurement]:
    q_THD, keys = drawn(shape)
    whole = _taken(timer, f"{shape} all keys", partial(attend, q_THD, keys))
    if whole is None:
        return
    seen = shape.num_tokens * (shape.num_keys - shape.num_tokens / 2)
    speed = 4 * seen * q_THD.shape[1] * shape.dim / whole * 1e-6
    yield Measurement(name=f"{shape} all keys", value=whole, unit="us")
    yield Measurement(name=f"{shape} all keys speed", value=speed, unit="TFLOP/s")
    for name in METHODS:
        steps, operations = prefill_steps(name, q_THD, keys)
        for found in _steps(timer, f"{shape} {name}", steps, whole):
            yield found
            if found.name.endswith(_READ):
                speed = operations / found.value * 1e-6
                yield Measurement(name=f"{found.name} speed", value=speed, unit="TFLOP/s")


def _steps(timer: KernelTimer, title: str, steps: Steps, whole: float) -> Iterator[Measurement]:
    taken = whole
    for name, call in steps.items():
        found = _taken(timer, f"{title} {name}", call)
        if found is None:
            return
        taken = found
        yield Measurement(name=f"{title} {name}", value=taken, unit="us")
    yield Measurement(name=f"{title} beside all keys", value=taken / whole, unit="x")


class Chosen(NamedTuple):
    """What a row of decode compares, and where its blocks are."""

    low_KBD: Tensor
    high_KBD: Tensor
    candidates: Candidates
    left_1: Tensor
    pools: Pools


def chosen_of(shape: DecodeShape, device: torch.device, *, is_encoded: bool) -> Chosen:
    """Random bounds; all blocks but the first and the latest ones compared."""
    num_blocks = shape.num_blocks
    bounds_2KBD = torch.randn(
        2, shape.num_kv_heads, num_blocks, shape.dim, dtype=torch.bfloat16, device=device
    )
    number_B = torch.arange(num_blocks, device=device)
    is_always_B = (number_B < _SINKS) | (number_B >= num_blocks - _LOCAL)
    flags_B = torch.where(is_always_B, ALWAYS | EXACT, FREE | (ENCODED if is_encoded else EXACT))
    num_picked = min(num_blocks, _READ_TOKENS // BLOCK_SIZE) - _SINKS - _LOCAL
    num_1 = torch.full((1,), num_picked, dtype=torch.int32, device=device)
    order_B = torch.randperm(num_blocks, device=device).to(torch.int32)
    heads = shape.num_kv_heads
    encoded_ids_B = order_B if is_encoded else None
    pools = Pools(order_B, encoded_ids_B, PAGE_BLOCKS, BLOCK_SIZE, heads, heads)
    return Chosen(
        bounds_2KBD.amin(dim=0),
        bounds_2KBD.amax(dim=0),
        Candidates(flags_B.to(torch.uint8)[None], num_1),
        torch.zeros_like(num_1),
        pools,
    )


def exact_steps(shape: DecodeShape, q_RTHD: Tensor) -> Steps:
    """Over exact blocks."""
    pages = one_head_pages(exact_pages(shape, q_RTHD.device))
    chosen = chosen_of(shape, q_RTHD.device, is_encoded=False)

    def read(exact: PagedRows, _: PagedRows | None) -> object:
        return decode(_heads_as_rows(shape, q_RTHD), pages, exact, _asked(shape))

    return _decode_steps(shape, q_RTHD, chosen, read)


def integer_steps(bits: int, shape: DecodeShape, q_RTHD: Tensor) -> Steps:
    """Over blocks of integers, and exact ones."""
    device = q_RTHD.device
    pages = one_head_pages(exact_pages(shape, device))
    keys, values = map(_one_head, integer_pages(bits, 16, shape, device))
    chosen = chosen_of(shape, device, is_encoded=True)

    def read(exact: PagedRows, encoded: PagedRows | None) -> object:
        assert encoded is not None
        q_X1HD, asked = _heads_as_rows(shape, q_RTHD), _asked(shape)
        found = (
            decode(q_X1HD, pages, exact, asked),
            decode_integers(q_X1HD, keys, values, encoded, asked),
        )
        return merge([PartialAttention(x.out_RTHD[:, 0], x.lse_RTH[:, 0]) for x in found])

    return _decode_steps(shape, q_RTHD, chosen, read)


DECODE_STEPS: Final[dict[str, Callable[[DecodeShape, Tensor], Steps]]] = {
    "bf16": exact_steps,
    "int4": partial(integer_steps, 4),
}


def _decode_steps(
    shape: DecodeShape,
    q_RTHD: Tensor,
    chosen: Chosen,
    read: Callable[[PagedRows, PagedRows | None], object],
) -> Steps:
    q_JHD = q_RTHD[:, 0]

    def bounds() -> Tensor:
        return largest_bounds(q_JHD, chosen.low_KBD, chosen.high_KBD, shape.dim**-0.5)

    def tables(score_KJB: Tensor) -> tuple[PagedRows, PagedRows | None]:
        return row_tables(score_KJB, chosen.candidates, chosen.left_1, chosen.pools)

    score_KJB = bounds()
    rows = tables(score_KJB)
    return {
        "bounds": bounds,
        "tables": partial(tables, score_KJB),
        _READ: partial(read, *rows),
        "in all": lambda: read(*tables(bounds())),
    }


def prefill_steps(name: str, q_THD: Tensor, keys: Keys) -> tuple[Steps, int]:
    """Of queries that are the last of the sequence, and the operations of what they read, as if
    their own blocks were seen whole."""
    method, device = METHODS[name], q_THD.device
    start = keys.num_keys - len(q_THD)
    own_T = torch.arange(start, keys.num_keys, device=device) // BLOCK_SIZE
    blocks = query_blocks(own_T, torch.ones_like(own_T, dtype=torch.bool))
    num_blocks = keys.num_keys // BLOCK_SIZE
    readable_JB = readable(blocks.own_J, num_blocks, None)
    flags_JB = torch.full_like(readable_JB, EXACT, dtype=torch.uint8)
    ranking = method.ranking(blocks, readable_JB)
    if ranking is None:
        worth_GJB = method.choose(0, blocks, readable_JB, torch.empty(0, device=device))
        candidates = Candidates(flags_JB)
    else:
        worth_GJB = torch.randn(q_THD.shape[1], *readable_JB.shape, device=device)
        flags_JB += torch.where(ranking.always_JB, ALWAYS, readable_JB * FREE).to(torch.uint8)
        candidates = Candidates(flags_JB, ranking.num_J.int())

    def listed() -> BlockLists:
        reads_GJB = worth_GJB if candidates.num_J is None else pick(worth_GJB, candidates)
        return lists(reads_GJB, flags_JB, EXACT)

    def read(found: BlockLists) -> object:
        chosen = TileBlocks(*found, BLOCK_SIZE, BLOCK_SIZE)
        return sparse_prefill(
            q_THD, keys, chosen, scale=q_THD.shape[2] ** -0.5, causal=Causal(start)
        )

    found = listed()
    rows = int(found.counts_GJ.sum()) * BLOCK_SIZE * q_THD.shape[1] // len(found.counts_GJ)
    operations = 4 * rows * BLOCK_SIZE * q_THD.shape[2]
    steps: Steps = {"lists": listed, _READ: partial(read, found), "in all": lambda: read(listed())}
    return steps, operations


def attend(q_THD: Tensor, keys: Keys) -> PartialAttention:
    """The same queries over all that they see."""
    causal, scale = Causal(keys.num_keys - len(q_THD)), q_THD.shape[2] ** -0.5
    if prefill_choice(q_THD, keys, causal=causal) is Prefill.PIPELINED:
        return prefill_gluon.prefill(q_THD, keys, scale=scale, causal=causal)
    return prefill_tl.prefill(q_THD, keys, scale=scale, causal=causal)


def _heads_as_rows(shape: DecodeShape, q_RTHD: Tensor) -> Tensor:
    return q_RTHD.reshape(shape.num_kv_heads, 1, -1, shape.dim)


def _one_head(pages: IntegerPages) -> IntegerPages:
    planes = {name: plane for name, plane in pages._asdict().items() if plane is not None}
    return pages._replace(**{name: one_head_planes(plane) for name, plane in planes.items()})


def _asked(shape: DecodeShape) -> Attention:
    return Attention(scale=shape.dim**-0.5)


def _taken(timer: KernelTimer, title: str, call: Callable[[], object]) -> float | None:
    """Microseconds; None where time is over or the kernel cannot run here."""
    if timer.is_over:
        return None
    try:
        return timer.microseconds(call, repeats=7)
    except FAILURES as error:
        report_failure(title, error)
        return None
