"""Calls of the kernels that read latents whose code is looked at on machines without a GPU
(`launches`), of the sizes that are served."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from kvcluster_kernels.paging import DecodeSettings

from kvcluster.bench.decode_caches import DecodeShape, queries
from kvcluster.bench.latent_caches import FORMATS, LatentFormat, absorbed_cache, latent_cache
from kvcluster.codec.latent import LatentStorage
from tests.kernels.latent_cases import BLOCKS, check

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


def _in_groups() -> object:
    """Numbers whose scales differ between groups of tokens, of the largest rank that is tested."""
    batch = replace(BLOCKS, num_heads=32, num_kv_heads=4, dim_k=128, dim_v=128)
    with suppress(AssertionError):  # Nothing is computed here.
        check(batch, _CPU, rank=200, storage=LatentStorage(8, group=32))
    return None


IN_GROUPS: dict[str, Callable[[], object]] = {"D128 8 bits in groups of 32": _in_groups}
LAUNCHES: dict[str, Callable[[], object]] = {**LATENTS, **ABSORBED, **IN_GROUPS}
