"""Suite `history` of `kvcluster bench kernels`: query tokens over a long history of encoded blocks,
which all of them see, beside the same over bfloat16 blocks."""

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Final

import torch
from kvcluster_kernels import prefill_gluon, prefill_tl
from kvcluster_kernels.packed_history import prefill_restored
from kvcluster_kernels.packed_prefill import History, PackedTiles, prefill_packed
from kvcluster_kernels.packed_restore import restore
from kvcluster_kernels.prefill_arguments import Keys
from torch import Tensor

from kvcluster.bench.decode_caches import (
    BLOCK_SIZE,
    DecodeShape,
    exact_pages,
    float8_pages,
    integer_pages,
)
from kvcluster.bench.kernel_failures import FAILURES, report_failure
from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.report import Measurement

SHAPES: Final = (
    DecodeShape(32, 8, 128, 1 << 17, num_tokens=4096),
    DecodeShape(32, 8, 128, 1 << 17, num_tokens=256),
)
_RATIOS: Final[Mapping[str, float]] = {"fp8": 1.0, "int8": 1.0, "int4": 0.85}
"""How fast as attention over bfloat16 is wanted, of the longest call."""
_TILES: Final = (PackedTiles(num_stages=4), PackedTiles(block_m=128, num_warps=8))


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:
    """Times, and ratios to the best kernel over bfloat16 blocks."""
    for shape in SHAPES:
        size = (shape.num_tokens, shape.num_query_heads, shape.dim)
        q_THD = torch.randn(size, dtype=torch.bfloat16, device="cuda")
        rules = {"scale": shape.dim**-0.5, "out_dtype": torch.bfloat16}
        kernel = prefill_gluon if prefill_gluon.is_available(q_THD.device) else prefill_tl
        exact = partial(kernel.prefill, q_THD, _exact(shape, q_THD.device), **rules)
        for name, history in histories(shape, q_THD.device):
            # Right before them, because speed follows what the GPU draws.
            base = yield from _timed(timer, f"{shape} bf16 before {name}", exact)
            calls: dict[str, Callable[[], object]] = {
                "restored": partial(prefill_restored, q_THD, history, **rules),
                "as stored": partial(prefill_packed, q_THD, history, **rules),
                "restoring alone": partial(restore, history, shape.dim, torch.bfloat16),
            }
            for tiles in _TILES if with_variants else ():
                calls[str(tiles)] = partial(prefill_packed, q_THD, history, **rules, tiles=tiles)
            for way, call in calls.items():
                if timer.is_over:
                    return
                taken = yield from _timed(timer, f"{shape} {name} {way}", call)
                if taken is None or base is None or way == "restoring alone":
                    continue
                wanted = _RATIOS[name] if way == "restored" and shape is SHAPES[0] else None
                yield Measurement(
                    name=f"{shape} {name} {way} beside bf16",
                    value=base / taken,
                    unit="x",
                    at_least=wanted,
                )


def _exact(shape: DecodeShape, device: torch.device) -> Keys:
    pages = exact_pages(shape, device)
    ids_N = _block_ids(shape, device)
    return Keys(pages.k_PKND, pages.v_PKND, shape.num_keys, ids_N, BLOCK_SIZE)


def histories(shape: DecodeShape, device: torch.device) -> Iterator[tuple[str, History]]:
    """Of all keys of the shape, in blocks in any order, in each format by its name."""
    ids_N = _block_ids(shape, device)
    yield "fp8", History(*float8_pages(shape, device), ids_N, shape.num_keys)
    for bits in (8, 4):
        yield f"int{bits}", History(*integer_pages(bits, 16, shape, device), ids_N, shape.num_keys)


def _block_ids(shape: DecodeShape, device: torch.device) -> Tensor:
    return torch.randperm(shape.num_blocks, dtype=torch.int32, device=device)


def _timed(
    timer: KernelTimer, title: str, call: Callable[[], object]
) -> Generator[Measurement, None, float | None]:
    """Also returns the time; None of what cannot run here."""
    try:
        taken = timer.microseconds(call, repeats=5)
    except FAILURES as error:
        report_failure(title, error)
        return None
    yield Measurement(name=title, value=taken, unit="us")
    return taken
