"""The latent decode kernel for Hopper: what it computes, with NumPy (`gluon_interpreter`)."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from kvcluster_kernels import latent_gluon_launch
from kvcluster_kernels.combine import combine_plain
from kvcluster_kernels.latent_pages import KeyExpansion, Latents
from kvcluster_kernels.latent_values import ValuePages
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from torch import Tensor

from kvcluster.codec.latent import LatentStorage
from tests.kernels.gluon_interpreter import LATENT_MODULES, Kernel
from tests.kernels.latent_cases import BLOCKS, ROTATIONS, check

CPU = torch.device("cpu")
STORAGE = LatentStorage(4)
VALUES = ("rotated4", "rotated3", "rotated2", "int8", "int4", "int3 in groups of 64")
D64 = replace(BLOCKS, dim_k=64, dim_v=64)
D128 = replace(BLOCKS, dim_k=128, dim_v=128)


@cache
def _kernel() -> Kernel:
    return Kernel(LATENT_MODULES, "latent_kernel", num_warps=4)


def decode(
    q_RTHD: Tensor,
    keys: Latents,
    expansion: KeyExpansion,
    values: ValuePages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None,
) -> Partial:
    """`decode_latents` with this kernel."""
    splits = latent_gluon_launch.splits(
        q_RTHD, keys, expansion, values, rows, attention, settings, kernel=_kernel()
    )
    return combine_plain(splits, num_tokens=q_RTHD.shape[1])


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_and_values(rotation: str, values: str) -> None:
    check(D64, CPU, rank=64, storage=STORAGE, rotation=rotation, values=values, decode=decode)


@pytest.mark.parametrize("rank", [64, 128, 192, 384])
def test_ranks(rank: int) -> None:
    batch = replace(D128, num_heads=8, num_kv_heads=4)

    check(batch, CPU, rank=rank, storage=STORAGE, values="rotated3", decode=decode)


@pytest.mark.parametrize("window", [None, 20, 100])
def test_windows_and_capped_scores(window: int | None) -> None:
    attention = Attention(scale=0.1, softcap=5.0, window=window)

    check(D64, CPU, storage=STORAGE, values="rotated3", attention=attention, decode=decode)


@pytest.mark.parametrize(("num_tokens", "columns"), [(3, 32), (8, 16), (16, 32)])
def test_several_query_tokens(num_tokens: int, columns: int) -> None:
    batch = replace(D64, num_tokens=num_tokens)
    settings = DecodeSettings(columns=columns, num_splits=2)

    check(batch, CPU, storage=STORAGE, values="rotated3", settings=settings, decode=decode)


def test_more_splits_than_blocks() -> None:
    batch = replace(D64, lengths=(700, 0, 65, 1))
    settings = DecodeSettings(num_splits=5, late_ns=500)

    check(batch, CPU, storage=STORAGE, values="rotated4", settings=settings, decode=decode)


@pytest.mark.parametrize(
    ("storage", "values"),
    [
        (LatentStorage(), "rotated3"),
        (LatentStorage(3), "rotated3"),
        (LatentStorage(4, group=16), "rotated3"),
        (LatentStorage(4, scale_bits=8), "rotated3"),
        (LatentStorage(4, is_rotated=True), "rotated3"),
        (STORAGE, "int4 scale_bits=8"),
        (STORAGE, "int2"),
        (STORAGE, "latent"),
    ],
    ids=str,
)
def test_other_formats_are_left_to_the_portable_kernel(storage: LatentStorage, values: str) -> None:
    with pytest.raises(ValueError, match="latents in Gluon"):
        check(D64, CPU, storage=storage, values=values, decode=decode)
