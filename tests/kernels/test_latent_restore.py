"""Latents, and rotated values, in line as numbers, in Triton's interpreter."""

import pytest
import torch
from kvcluster_kernels import latent_plain
from kvcluster_kernels.latent_restore import restore_numbers, restore_values
from kvcluster_kernels.rotated_decode import RotatedPages
from torch import Tensor

from kvcluster.codec.filling import Grade
from kvcluster.codec.latent import LatentKeys, LatentStorage
from tests.kernels.decode_cases import draw_rows
from tests.kernels.latent_cases import BLOCKS, NUMBERS, STORAGES, VALUES, draw_basis, drawn_latents

FORMATS = {
    "16 bits": NUMBERS,
    **STORAGES,
    "filled": LatentStorage(grades=(Grade(8, 16), Grade(3, 32), Grade(2, 24))),
}


@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
def test_latents_of_every_format(storage: LatentStorage, interpreted: torch.device) -> None:
    check_numbers(storage, interpreted)


def check_numbers(storage: LatentStorage, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(BLOCKS, generator, device)
    basis = draw_basis(BLOCKS.num_kv_heads, BLOCKS.dim_k, 72, generator)
    codec = LatentKeys(
        basis, num_heads=BLOCKS.num_kv_heads, rank=72, rotation=None, storage=storage
    )
    pages = drawn_latents(codec, BLOCKS.dim_k, BLOCKS, rows, 1)
    blocks_1N = rows.blocks_RB[:1, :2].contiguous()

    found_XC = restore_numbers(pages, blocks_1N[0])

    want_1N1SC = latent_plain.restore_latents(pages, blocks_1N, torch.float64)
    assert_close(found_XC, want_1N1SC[0, :, 0].flatten(0, 1))


@pytest.mark.parametrize("values", ["rotated4", "rotated3", "rotated2"])
def test_rotated_values(values: str, interpreted: torch.device) -> None:
    check_values(values, interpreted)


def check_values(values: str, device: torch.device) -> None:
    rows = draw_rows(BLOCKS, torch.Generator().manual_seed(0), device)
    pages = VALUES[values](BLOCKS, rows)
    blocks_1N = rows.blocks_RB[:1, :2].contiguous()
    assert isinstance(pages, RotatedPages)

    found_KXD = restore_values(pages, blocks_1N[0], BLOCKS.block_size)

    want_1KXD = latent_plain.restore_values(pages, blocks_1N, BLOCKS.block_size, torch.float64)
    assert_close(found_KXD, want_1KXD[0])


def assert_close(found: Tensor, want: Tensor) -> None:
    """Scale, zero-point and number are rounded to float16."""
    assert found.shape == want.shape
    assert (found.double() - want).abs().max() <= 3 * 2.0**-11 * want.abs().max()
