"""Suite `latent` of `kvcluster bench kernels`: one token over a long paged cache of latents.

As in suite `decode`, beside our own bfloat16 over as many keys. The expansion of keys is bound by
the matrix unit where it takes longer than the cache's bytes: its share of that is printed as well.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch
from kvcluster_kernels.paging import DecodeSettings
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from kvcluster.bench.decode_caches import Cache, DecodeShape, exact_cache, queries
from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.latent_caches import (
    FORMATS,
    MLA_ROTARY_DIM,
    LatentFormat,
    absorbed_cache,
    latent_cache,
)
from kvcluster.bench.report import Measurement

SHAPES: Final = (
    DecodeShape(64, 8, 128, 1 << 17),
    DecodeShape(64, 8, 128, 1 << 20),
    DecodeShape(32, 8, 64, 1 << 20),
)
ABSORBED_SHAPES: Final = tuple(
    DecodeShape(heads, 1, 576, length) for length in (1 << 17, 1 << 20) for heads in (16, 32, 128)
)
"""Multi-head latent attention, of which tensor parallelism leaves a processor some heads."""

_GPU: Final = torch.device("cuda")
_RECIPE: Final = FORMATS[0]
_WANTED_RATIO: Final = 1.0
"""Of the recipe of low-rank keys and low-bit values, beside bfloat16."""

VARIED_FORMATS: Final = FORMATS[:3]
_PORTABLE: Final = tuple(
    DecodeSettings(
        num_warps=warps, num_stages=stages, programs_per_processor=programs, is_portable=True
    )
    for warps, stages, programs in (
        (4, 2, 2),
        (4, 3, 2),
        (4, 4, 1),
        (4, 6, 2),
        (4, 6, 3),
        (8, 4, 1),
        (8, 2, 2),
    )
)
VARIANTS: Final = (
    *_PORTABLE,
    *(
        DecodeSettings(programs_per_processor=programs, columns=16, late_ns=late_ns)
        for programs, late_ns in ((1, 0), (2, 0), (2, 500), (2, 1000), (2, 1500))
    ),
)
"""Of the portable kernel; then of the one for Hopper, where there is one of the format."""
ABSORBED_VARIANTS: Final = tuple(
    DecodeSettings(tile=tile, num_warps=warps, num_stages=stages, programs_per_processor=programs)
    for tile, warps, stages, programs in (
        (32, 4, 4, 1),
        (32, 4, 4, 2),
        (32, 4, 6, 1),
        (32, 4, 6, 2),
        (32, 8, 4, 1),
        (64, 4, 4, 1),
        (64, 8, 2, 1),
        (64, 8, 4, 1),
    )
)


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:
    """First every format as it is served with, then, if asked, other settings."""
    for shape in SHAPES:
        yield from _formats(timer, shape, FORMATS)
    for shape in ABSORBED_SHAPES:
        yield from _absorbed(timer, shape)
    if with_variants:
        for form in VARIED_FORMATS:
            cache = _held(partial(latent_cache, form), SHAPES[0])
            yield from _variants(timer, f"{SHAPES[0]} {form}", cache, VARIANTS)
        for shape in ABSORBED_SHAPES[:3]:
            cache = _held(absorbed_cache, shape)
            yield from _variants(timer, f"{shape} MLA", cache, ABSORBED_VARIANTS)


def _held(build: Callable[[DecodeShape, torch.Tensor], Cache], shape: DecodeShape) -> Cache:
    return build(shape, queries(shape, _GPU))


def _formats(
    timer: KernelTimer, shape: DecodeShape, forms: Sequence[LatentFormat]
) -> Iterator[Measurement]:
    if timer.is_over:
        return
    exact = _taken(timer, f"{shape} bf16", _held(exact_cache, shape))
    for form in forms:
        if timer.is_over:
            return
        title = f"{shape} {form}"
        cache = _held(partial(latent_cache, form), shape)
        taken = _taken(timer, title, cache)
        if taken is None:
            continue
        yield from _times(title, taken, cache.num_bytes)
        width = shape.num_kv_heads * shape.dim
        operations = 2 * form.rank(shape) * width * shape.num_keys
        yield Measurement(
            name=f"{title} expansion", value=operations / taken * 1e-6, unit="TFLOP/s"
        )
        if exact is not None:
            wanted = _WANTED_RATIO if form == _RECIPE else None
            yield Measurement(
                name=f"{title} beside bf16", value=exact / taken, unit="x", at_least=wanted
            )


def _absorbed(timer: KernelTimer, shape: DecodeShape) -> Iterator[Measurement]:
    title = f"{shape} MLA"
    if timer.is_over:
        return
    cache = _held(absorbed_cache, shape)
    taken = _taken(timer, title, cache)
    if taken is None:
        return
    yield from _times(title, taken, cache.num_bytes)
    operations = 2 * shape.num_query_heads * (2 * shape.dim - MLA_ROTARY_DIM) * shape.num_keys
    yield Measurement(name=f"{title} products", value=operations / taken * 1e-6, unit="TFLOP/s")


def _variants(
    timer: KernelTimer, title: str, cache: Cache, variants: Sequence[DecodeSettings]
) -> Iterator[Measurement]:
    for settings in variants:
        name = (
            f"variant {title} tile={settings.tile} warps={settings.num_warps} "
            f"stages={settings.num_stages} programs={settings.programs_per_processor} "
            f"late={settings.late_ns} portable={settings.is_portable}"
        )
        taken = _taken(timer, name, cache, settings)
        if taken is not None:
            yield Measurement(name=name, value=taken, unit="us")


def _taken(
    timer: KernelTimer, title: str, cache: Cache, settings: DecodeSettings | None = None
) -> float | None:
    """Microseconds; None where time is over, or where the kernel cannot run here, which must not
    cost the run's other numbers."""
    if timer.is_over:
        return None
    try:
        return timer.microseconds(partial(cache.decode, settings))
    except (RuntimeError, CompilationError, OutOfResources) as error:
        sys.stderr.write(f"{title}: {type(error).__name__}: {str(error)[:300]}\n")
        return None


def _times(title: str, taken: float, num_bytes: int) -> Iterator[Measurement]:
    yield Measurement(name=title, value=taken, unit="us")
    yield Measurement(name=f"{title} speed", value=num_bytes / taken * 1e-6, unit="TB/s")
