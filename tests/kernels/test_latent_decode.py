"""Decode over latent keys, as the cache's codec writes them, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import latent_plain
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.latent_decode import decode_latents
from kvcluster_kernels.latent_pages import LatentPages
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows

from kvcluster.codec.array import consecutive
from kvcluster.codec.filling import Grade
from kvcluster.codec.latent import LatentKeys, LatentStorage
from tests.kernels.decode_cases import draw_queries, draw_rows
from tests.kernels.latent_cases import (
    BLOCKS,
    ROTATIONS,
    STORAGES,
    VALUES,
    check,
    draw_basis,
    expansion_of,
    rotary,
)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_keys_are_turned_to_their_positions(rotation: str, interpreted: torch.device) -> None:
    check(BLOCKS, interpreted, rotation=rotation)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_latents_of_low_bits(storage: LatentStorage, interpreted: torch.device) -> None:
    check(BLOCKS, interpreted, storage=storage)


@pytest.mark.parametrize(
    ("rank", "bits"), [(16, None), (44, None), (128, None), (32, 4), (100, 4), (72, 3), (4, 2)]
)
def test_every_rank(rank: int, bits: int | None, interpreted: torch.device) -> None:
    check(BLOCKS, interpreted, rank=rank, storage=LatentStorage(bits))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_rotated_latents_of_parts_that_are_powers_of_two(
    bits: int, interpreted: torch.device
) -> None:
    check(BLOCKS, interpreted, rank=104, storage=LatentStorage(bits, is_rotated=True))


def test_directions_of_the_bits_that_they_are_worth(interpreted: torch.device) -> None:
    grades = (Grade(8, 16), Grade(4, 24), Grade(3, 32), Grade(2, 20))

    check(BLOCKS, interpreted, rank=92, storage=LatentStorage(grades=grades, scale_bits=8))


@pytest.mark.parametrize("dim", [32, 96, 128])
def test_heads_of_every_size(dim: int, interpreted: torch.device) -> None:
    check(replace(BLOCKS, dim_k=dim, dim_v=dim), interpreted, values="exact")


@pytest.mark.parametrize("values", VALUES)
def test_values_of_every_format(values: str, interpreted: torch.device) -> None:
    check(BLOCKS, interpreted, values=values)


def test_several_query_tokens_with_a_window(interpreted: torch.device) -> None:
    batch = replace(BLOCKS, num_tokens=4, lengths=(110, 0, 70))

    check(batch, interpreted, attention=Attention(scale=0.1, softcap=5.0, window=100))


def test_splits_and_short_blocks(interpreted: torch.device) -> None:
    batch = replace(BLOCKS, block_size=16)

    check(batch, interpreted, values="int8", settings=DecodeSettings(num_splits=3))


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_definition_restores_the_keys_that_the_codec_does(rotation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    num_heads, dim, rank, block_size = 2, 32, 24, 16
    basis = draw_basis(num_heads, dim, rank, generator)
    turning = rotary(rotation, dim)
    codec = LatentKeys(basis, num_heads=num_heads, rank=rank, rotation=turning)
    x_BKSD = torch.randn(3, num_heads, block_size, dim, generator=generator)
    positions_BS = consecutive(torch.tensor([0, 512, 130_016]), block_size)
    (planes,) = codec.encode(x_BKSD, positions_BS)
    rows = PagedRows(
        torch.arange(3, dtype=torch.int32)[None],
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([48], dtype=torch.int32),
        positions_BS[None, :, 0].to(torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
    )

    expansion = expansion_of(basis, num_heads, turning, torch.device("cpu"))
    found = latent_plain.restore_keys(LatentPages(planes[:, None]), expansion, rows, torch.float64)

    want_BKSD = codec.decode((planes,), positions_BS)
    want_KSD = want_BKSD.transpose(0, 1).flatten(1, 2).double()
    # `up` in float16; and the angle of a far position as the codec rounds it, to 2^-24 of itself.
    assert (found[0] - want_KSD).abs().max() <= (2e-3 + 130_016 * 2**-23) * want_KSD.abs().max()


def test_latents_without_positions_are_refused() -> None:
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    rows = draw_rows(replace(BLOCKS, has_positions=False), generator, cpu)
    q_RTHD = draw_queries(BLOCKS, generator, cpu)
    expansion = expansion_of(draw_basis(2, 64, 32, generator), 2, None, cpu)
    keys = LatentPages(torch.zeros(2, 4, 1, 64, 32, dtype=torch.float16))
    values = LatentPages(torch.zeros(2, 4, 2, 64, 64, dtype=torch.float16))

    with pytest.raises(ValueError, match="give those of the blocks"):
        decode_latents(q_RTHD, keys, expansion, values, rows, Attention(scale=1.0))


def test_latents_of_another_rank_are_refused() -> None:
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    rows = draw_rows(BLOCKS, generator, cpu)
    q_RTHD = draw_queries(BLOCKS, generator, cpu)
    expansion = expansion_of(draw_basis(2, 64, 32, generator), 2, None, cpu)
    keys = LatentPages(torch.zeros(2, 4, 1, 64, 48, dtype=torch.float16))
    values = LatentPages(torch.zeros(2, 4, 2, 64, 64, dtype=torch.float16))

    with pytest.raises(ValueError, match="do not go together"):
        decode_latents(q_RTHD, keys, expansion, values, rows, Attention(scale=1.0))


def test_blocks_too_short_for_values_of_3_bits_are_refused() -> None:
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    rows = draw_rows(BLOCKS, generator, cpu)
    q_RTHD = draw_queries(BLOCKS, generator, cpu)
    expansion = expansion_of(draw_basis(2, 64, 32, generator), 2, None, cpu)
    keys = LatentPages(torch.zeros(2, 4, 1, 32, 32, dtype=torch.float16))
    low, high = (torch.zeros(2, 4, 2, 64, size, dtype=torch.uint8) for size in (8, 4))
    grid = torch.zeros(2, 4, 2, 1, 32, dtype=torch.float16)

    with pytest.raises(ValueError, match="3 bits want blocks of 64 tokens"):
        decode_latents(
            q_RTHD,
            keys,
            expansion,
            IntegerPages(low, grid, grid, high=high),
            rows,
            Attention(scale=1.0),
        )
