"""Calls of the kernels that read latents whose code is looked at on machines without a GPU
(`launches`), of the sizes that are served."""

from collections.abc import Callable
from functools import partial

import torch
from kvcluster_kernels.paging import DecodeSettings

from kvcluster.bench.decode_caches import DecodeShape, queries
from kvcluster.bench.latent_caches import FORMATS, LatentFormat, absorbed_cache, latent_cache

_CPU = torch.device("cpu")
_LARGE = DecodeShape(64, 8, 128, 256)
_SMALL = DecodeShape(32, 8, 64, 256)


def _latents(form: LatentFormat, shape: DecodeShape) -> object:
    return latent_cache(form, shape, queries(shape, _CPU)).decode(None)


LATENTS: dict[str, Callable[[], object]] = {
    **{f"D128 {form}": partial(_latents, form, _LARGE) for form in FORMATS},
    **{f"D64 {form}": partial(_latents, form, _SMALL) for form in FORMATS[:3]},
    "D128 four query tokens": partial(_latents, FORMATS[0], _LARGE._replace(num_tokens=4)),
}


def _absorbed(num_heads: int, settings: DecodeSettings | None = None) -> object:
    shape = DecodeShape(num_heads, 1, 576, 256)
    return absorbed_cache(shape, queries(shape, _CPU)).decode(settings)


ABSORBED: dict[str, Callable[[], object]] = {
    f"{heads} heads over latents of 512 + 64": partial(_absorbed, heads) for heads in (16, 32, 128)
}
LAUNCHES: dict[str, Callable[[], object]] = {**LATENTS, **ABSORBED}
