"""Calls of the kernels of single rows whose code is looked at on machines without a GPU
(`launches`)."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from kvcluster_kernels import combine_pools, rotated_rows, row_products
from kvcluster_kernels.paging import SplitPartials
from kvcluster_kernels.rotated_rows import Slots
from kvcluster_kernels.row_products import Norm

_DTYPE = torch.bfloat16


def _on_hopper(launch: Callable[[], object]) -> None:
    """As on a GPU whose kernels overlap, which tensors on a CPU are not."""
    modules = (combine_pools, rotated_rows, row_products)
    patches = [mock.patch.object(module, "overlaps", return_value=True) for module in modules]
    for patch in patches:
        patch.start()
    try:
        launch()
    finally:
        for patch in patches:
            patch.stop()


def _weight(num_rows: int, dim: int) -> torch.Tensor:
    return torch.empty(num_rows, dim, dtype=_DTYPE)


def _norm(dim: int) -> Norm:
    return Norm(torch.empty(dim, dtype=_DTYPE), 1e-5)


def _qkv() -> None:
    x_E = torch.empty(4096, dtype=_DTYPE)
    row_products.products(x_E, [_weight(n, 4096) for n in (4096, 1024, 1024)], norm=_norm(4096))


def _out() -> None:
    x_E = torch.empty(4096, dtype=_DTYPE)
    row_products.products(x_E, [_weight(4096, 4096)], residual_N=x_E)


def _gated() -> None:
    x_E = torch.empty(4096, dtype=_DTYPE)
    row_products.gated_product(x_E, _weight(2048, 4096), _weight(2048, 4096), norm=_norm(4096))


def _rotated() -> None:
    pages = torch.empty(2, 8, 64, 128, dtype=_DTYPE)
    ids_R = torch.zeros(1, dtype=torch.int64)
    turns_RD = torch.empty(1, 128, dtype=_DTYPE)
    qkv_RXD = torch.empty(1, 48, 128, dtype=_DTYPE)
    rotated_rows.rotate_and_write(qkv_RXD, turns_RD, turns_RD, Slots(pages, pages, ids_R, ids_R))


def _combined() -> None:
    pools = [
        SplitPartials(torch.empty(1, 8, splits, 4, 128), torch.empty(1, 8, splits, 4))
        for splits in (5, 48)
    ]
    combine_pools.combine_pools(pools, num_tokens=1, out_dtype=_DTYPE)


LAUNCHES: dict[str, Callable[[], object]] = {
    name: partial(_on_hopper, launch)
    for name, launch in {
        "three products of a normed row": _qkv,
        "a product and a residual": _out,
        "a gated product": _gated,
        "turned and written": _rotated,
        "two pools": _combined,
    }.items()
}
