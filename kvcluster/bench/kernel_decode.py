"""Suite `decode` of `kvcluster bench kernels`: one token, or a few, over a long paged cache.

Times are of whole calls, the merge of splits included, over caches much larger than L2 whose blocks
lie in random order. Bandwidth is the cache's bytes, scales included, over the time.
"""

import sys
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from typing import Final

import torch
from kvcluster_kernels.paging import DecodeSettings
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from kvcluster.bench.decode_caches import CACHES, DecodeShape, queries
from kvcluster.bench.kernel_peers import decode_peers
from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.report import Measurement

SHAPES: Final = (
    DecodeShape(64, 8, 128, 1 << 17),
    DecodeShape(64, 8, 128, 1 << 20),
    DecodeShape(32, 8, 128, 1 << 17),
    DecodeShape(32, 8, 128, 1 << 20),
)
FEW_TOKENS: Final = (
    DecodeShape(64, 8, 128, 1 << 17, num_tokens=8),
    DecodeShape(64, 8, 128, 1 << 17, num_tokens=16),
)

_GPU: Final = torch.device("cuda")
_BF16: Final = "bf16"
_SPEEDS: Final = {1 << 17: 2.75, 1 << 20: 3.0}
"""TB/s of bfloat16 that are wanted, by length."""
_RATIOS: Final[Mapping[str, Mapping[int, float]]] = {
    "fp8": {1 << 17: 1.85, 1 << 20: 1.9},
    "int8": {1 << 17: 1.85, 1 << 20: 1.9},
    "int8 scale_bits=8": {1 << 17: 1.85, 1 << 20: 1.9},
    "int4": {1 << 17: 2.5, 1 << 20: 3.1},
    "int4 scale_bits=8": {1 << 17: 2.5, 1 << 20: 3.1},
    "int3": {},
    "int2": {1 << 20: 3.3},
    "rotated4": {},
    "rotated3": {1 << 20: 3.3},
    "rotated2": {},
}
"""How much faster than our bfloat16 is wanted."""
_CUDNN_RATIO: Final = 8.0
"""How much faster than cuDNN is wanted with 8 or 16 query tokens."""

_EXACT_VARIANTS: Final = tuple(
    DecodeSettings(tile=tile, num_stages=stages, programs_per_processor=programs)
    for tile, stages, programs in (
        (64, 4, 4),
        (64, 4, 5),
        (64, 6, 2),
        (64, 6, 3),
        (64, 8, 2),
        (32, 6, 4),
        (128, 4, 2),
    )
)
_FLOAT8_VARIANTS: Final = tuple(
    DecodeSettings(num_warps=warps, num_stages=stages, programs_per_processor=programs)
    for warps, stages, programs in ((2, 6, 4), (2, 4, 6), (4, 4, 3), (4, 6, 2), (4, 6, 3))
)
_PACKED_VARIANTS: Final = tuple(
    DecodeSettings(num_stages=stages, programs_per_processor=programs, columns=16)
    for stages, programs in ((2, 6), (2, 8), (2, 10), (3, 6), (3, 7), (3, 8), (4, 5))
)


_VARIANTS: Final = {_BF16: _EXACT_VARIANTS, "fp8": _FLOAT8_VARIANTS}


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:
    """First every kernel as it is served with and its peers, then, if asked, other settings."""
    for shape in SHAPES:
        if timer.is_over:
            return
        peers = yield from _peers(timer, shape)
        yield from _ours(timer, shape, tuple(CACHES), peers)
    for shape in FEW_TOKENS:
        peers = yield from _peers(timer, shape)
        yield from _ours(timer, shape, (_BF16, "fp8", "int8", "int4"), peers)
    if with_variants:
        for shape in SHAPES[:2]:
            yield from _variants(timer, shape)


def _peers(
    timer: KernelTimer, shape: DecodeShape
) -> Generator[Measurement, None, Mapping[str, float]]:
    """Also returns their times."""
    size = (1, shape.num_kv_heads, shape.num_keys, shape.dim)
    k_1KSD, v_1KSD = (torch.randn(size, dtype=torch.bfloat16, device=_GPU) for _ in range(2))
    taken: dict[str, float] = {}
    for name, call in decode_peers(queries(shape, _GPU).transpose(1, 2), k_1KSD, v_1KSD).items():
        if not timer.is_over:
            try:
                taken[name] = timer.microseconds(call)
            except (RuntimeError, TypeError) as error:
                _report_failure(f"{shape} {name}", error)
                continue
            yield from _times(f"{shape} {name}", taken[name], shape.exact_bytes)
    return taken


def _ours(
    timer: KernelTimer, shape: DecodeShape, names: tuple[str, ...], peers: Mapping[str, float]
) -> Iterator[Measurement]:
    q_RTHD = queries(shape, _GPU)
    exact = None
    for name in names:
        if timer.is_over:
            return
        cache = CACHES[name](shape, q_RTHD)
        title = f"{shape} ours {name}"
        try:
            taken = timer.microseconds(partial(cache.decode, None))
        except (RuntimeError, CompilationError, OutOfResources) as error:
            _report_failure(title, error)
            continue
        wanted = _SPEEDS[shape.num_keys] if name == _BF16 and shape.num_tokens == 1 else None
        yield from _times(title, taken, cache.num_bytes, speed=wanted)
        if name == _BF16:
            exact = taken
            if peers:
                yield Measurement(
                    name=f"{title} beside the best peer",
                    value=min(peers.values()) / taken,
                    unit="x",
                    at_least=1.0,
                )
            if shape.num_tokens > 1 and "cuDNN grouped" in peers:
                yield Measurement(
                    name=f"{title} beside cuDNN grouped",
                    value=peers["cuDNN grouped"] / taken,
                    unit="x",
                    at_least=_CUDNN_RATIO,
                )
        elif exact is not None:
            ratio = _RATIOS[name].get(shape.num_keys) if shape.num_tokens == 1 else None
            yield Measurement(
                name=f"{title} beside bf16", value=exact / taken, unit="x", at_least=ratio
            )


def _variants(timer: KernelTimer, shape: DecodeShape) -> Iterator[Measurement]:
    q_RTHD = queries(shape, _GPU)
    for name, build in CACHES.items():
        cache = build(shape, q_RTHD)
        for settings in _VARIANTS.get(name, _PACKED_VARIANTS):
            if timer.is_over:
                return
            title = (
                f"variant {shape} {name} tile={settings.tile} warps={settings.num_warps} "
                f"stages={settings.num_stages} programs={settings.programs_per_processor}"
            )
            try:
                taken = timer.microseconds(partial(cache.decode, settings))
            except (RuntimeError, CompilationError, OutOfResources) as error:
                _report_failure(title, error)
                continue
            yield Measurement(name=title, value=taken, unit="us")


def _times(
    title: str, taken: float, num_bytes: int, speed: float | None = None
) -> Iterator[Measurement]:
    yield Measurement(name=title, value=taken, unit="us")
    yield Measurement(
        name=f"{title} speed", value=num_bytes / taken * 1e-6, unit="TB/s", at_least=speed
    )


def _report_failure(title: str, error: BaseException) -> None:
    """One kernel that cannot run here must not cost the run's other numbers."""
    sys.stderr.write(f"{title}: {type(error).__name__}: {str(error)[:300]}\n")
