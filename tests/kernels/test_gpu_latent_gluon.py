"""The latent decode kernel for Hopper, on one."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import latent_gluon_launch
from kvcluster_kernels.combine import combine
from kvcluster_kernels.latent_pages import KeyExpansion, Latents
from kvcluster_kernels.latent_values import ValuePages
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from torch import Tensor

from kvcluster.codec.latent import LatentStorage
from tests.kernels.latent_cases import ROTATIONS, check
from tests.kernels.test_gpu_latent import LONG

pytestmark = pytest.mark.gpu
STORAGE = LatentStorage(4)
VALUES = ("rotated4", "rotated3", "rotated2", "int8", "int4", "int3 in groups of 64")


@pytest.fixture
def hopper(gpu: torch.device) -> torch.device:
    if torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("the kernel is for Hopper")
    return gpu


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
    assert latent_gluon_launch.reason_against(q_RTHD, keys, expansion, values, attention) is None
    splits = latent_gluon_launch.splits(q_RTHD, keys, expansion, values, rows, attention, settings)
    return combine(splits, num_tokens=q_RTHD.shape[1])


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dim", [64, 128])
def test_values_and_rotations(dim: int, values: str, rotation: str, hopper: torch.device) -> None:
    batch = replace(LONG, dim_k=dim, dim_v=dim)

    check(batch, hopper, rank=192, storage=STORAGE, rotation=rotation, values=values,
          decode=decode)  # fmt: skip


@pytest.mark.parametrize("rank", [64, 128, 256, 384, 512])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_ranks(rank: int, num_tokens: int, hopper: torch.device) -> None:
    batch = replace(LONG, num_tokens=num_tokens)

    check(batch, hopper, rank=rank, storage=STORAGE, values="rotated3", decode=decode)


@pytest.mark.parametrize("num_splits", [1, 3, 200])
def test_splits(num_splits: int, hopper: torch.device) -> None:
    settings = DecodeSettings(num_splits=num_splits, late_ns=500)
    attention = Attention(scale=0.1, softcap=5.0, window=1000)

    check(LONG, hopper, rank=128, storage=STORAGE, values="rotated3", attention=attention,
          settings=settings, decode=decode)  # fmt: skip
