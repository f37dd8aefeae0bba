"""Launches of the latent decode kernel for Hopper whose code is looked at on machines without a GPU
(`launches`), of the sizes that are served."""

from collections.abc import Callable
from functools import partial

import torch
from kvcluster_kernels import latent_gluon_launch
from kvcluster_kernels.paging import Attention

from kvcluster.bench.decode_caches import DecodeShape, queries
from kvcluster.bench.latent_caches import LatentFormat, latent_planes, rows_in_line

_CPU = torch.device("cpu")
_LARGE = DecodeShape(64, 8, 128, 256)
_SMALL = DecodeShape(32, 8, 64, 256)


def _splits(form: LatentFormat, shape: DecodeShape) -> object:
    planes = latent_planes(form, shape, _CPU)
    rows, attention = rows_in_line(shape, _CPU), Attention(scale=shape.dim**-0.5)
    return latent_gluon_launch.splits(queries(shape, _CPU), *planes, rows, attention)


LAUNCHES: dict[str, Callable[[], object]] = {
    "D128 r=0.25 rotated3": partial(_splits, LatentFormat(0.25, 4, "rotated3"), _LARGE),
    "D128 r=0.375 rotated3": partial(_splits, LatentFormat(0.375, 4, "rotated3"), _LARGE),
    "D128 r=0.25 rotated4": partial(_splits, LatentFormat(0.25, 4, "rotated4"), _LARGE),
    "D128 r=0.25 rotated2": partial(_splits, LatentFormat(0.25, 4, "rotated2"), _LARGE),
    "D128 r=0.25 int4": partial(_splits, LatentFormat(0.25, 4, "int4"), _LARGE),
    "D64 r=0.375 rotated3": partial(_splits, LatentFormat(0.375, 4, "rotated3"), _SMALL),
    "D128 two query tokens": partial(
        _splits, LatentFormat(0.25, 4, "rotated3"), _LARGE._replace(num_tokens=2)
    ),
}
