"""The cases of the interpreter, and larger ones, with kernels over latents compiled for the GPU."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels.paging import Attention, DecodeSettings

from kvcluster.codec.latent import LatentStorage
from tests.kernels.decode_cases import Batch
from tests.kernels.latent_cases import ROTATIONS, STORAGES, VALUES, check
from tests.kernels.test_absorbed_decode import check as check_absorbed

pytestmark = pytest.mark.gpu

LONG = Batch(
    lengths=(5_011, 0, 1, 2_048),
    skipped=7,
    num_heads=32,
    num_kv_heads=4,
    dim_k=128,
    dim_v=128,
    block_size=64,
    page_blocks=8,
    has_positions=True,
    dtype=torch.bfloat16,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_rotations(bits: int | None, rotation: str, gpu: torch.device) -> None:
    check(LONG, gpu, rank=128, storage=LatentStorage(bits), rotation=rotation)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dim", [64, 128])
def test_values(dim: int, values: str, gpu: torch.device) -> None:
    check(replace(LONG, dim_k=dim, dim_v=dim), gpu, storage=LatentStorage(4), values=values)


@pytest.mark.parametrize(("rank", "bits"), [(44, None), (100, 4), (256, None), (256, 4), (512, 4)])
def test_ranks(rank: int, bits: int | None, gpu: torch.device) -> None:
    check(LONG, gpu, rank=rank, storage=LatentStorage(bits))


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("rank", [64, 200])
def test_latents_of_low_bits(rank: int, storage: LatentStorage, gpu: torch.device) -> None:
    check(LONG, gpu, rank=rank, storage=storage)


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_sizes(block_size: int, gpu: torch.device) -> None:
    check(replace(LONG, block_size=block_size), gpu, values="exact")


def test_several_query_tokens(gpu: torch.device) -> None:
    attention = Attention(scale=0.1, softcap=5.0, window=1000)

    check(replace(LONG, num_tokens=4), gpu, rank=128, storage=LatentStorage(4), attention=attention)


@pytest.mark.parametrize("num_stages", [2, 6])
@pytest.mark.parametrize("num_warps", [4, 8])
def test_other_settings(num_warps: int, num_stages: int, gpu: torch.device) -> None:
    settings = DecodeSettings(num_warps=num_warps, num_stages=num_stages, programs_per_processor=1)

    check(LONG, gpu, rank=128, storage=LatentStorage(4), settings=settings)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("num_heads", [1, 16, 32, 128])
def test_latents_as_they_are(num_heads: int, dtype: torch.dtype, gpu: torch.device) -> None:
    is_float32 = dtype == torch.float32
    batch = replace(
        LONG, num_heads=num_heads, num_kv_heads=1, dim_k=144 if is_float32 else 576, dtype=dtype
    )

    check_absorbed(replace(batch, dim_v=batch.dim_k), gpu, dim=128 if is_float32 else 512)


def test_latents_as_they_are_of_several_query_tokens(gpu: torch.device) -> None:
    batch = replace(LONG, num_heads=16, num_kv_heads=1, dim_k=576, dim_v=576, num_tokens=4)

    check_absorbed(batch, gpu, dim=512, attention=Attention(scale=0.05, softcap=3.0, window=900))
