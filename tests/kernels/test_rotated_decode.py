"""Decode over rotated vectors, as the cache's codec writes them, in Triton's interpreter."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import packed_plain
from kvcluster_kernels.levels import levels
from kvcluster_kernels.paging import Attention, DecodeSettings, Partial
from kvcluster_kernels.rotated_decode import RotatedPages, decode_rotated
from torch import Tensor

from kvcluster.codec.rotated import Rotated, codebook, rotate
from tests.kernels.decode_cases import (
    RAGGED,
    Batch,
    Bounds,
    assert_within,
    draw_queries,
    draw_rows,
)
from tests.kernels.packed_cases import draw_packed

ATTENTION = Attention(scale=0.1)
BLOCKS = replace(RAGGED, lengths=(110, 0, 1, 123), block_size=64)


def check(
    batch: Batch,
    bits: int,
    device: torch.device,
    attention: Attention = ATTENTION,
    settings: DecodeSettings | None = None,
    *,
    centred: bool = True,
    decode: Callable[..., Partial] = decode_rotated,
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, device)
    q_RTHD = draw_queries(batch, generator, device)
    dim = batch.dim_k
    rotation_DD = rotate(torch.eye(dim)).T.contiguous().to(device)
    keys, values = Rotated(bits, centred=centred), Rotated(bits, transposed=True)
    k = _pages(bits, draw_packed(keys, dim, batch, rows, generator))
    v = _pages(bits, draw_packed(values, dim, batch, rows, generator))

    found = decode(q_RTHD, k, v, rotation_DD, rows, attention, settings)

    want = packed_plain.decode_rotated(q_RTHD.double(), k, v, rotation_DD, rows, attention)
    # Queries and weights are rounded to float16, and so are the levels that both are multiplied
    # with: as much again, relative to the lengths of vectors, which no rotation changes. What is
    # rounded of values spreads over the channels that it is rotated back into.
    k_RKSD = packed_plain.in_line(
        packed_plain.restore_rotated_keys(k, rotation_DD.double(), rows.blocks_RB)
    )
    v_RBKSD = packed_plain.restore_rotated_values(v, rotation_DD.double(), rows.blocks_RB)
    lengths_RKSD = packed_plain.in_line(v_RBKSD.norm(dim=-1, keepdim=True).expand_as(v_RBKSD))
    magnitude = packed_plain.attend_tokens(q_RTHD.double(), k_RKSD, lengths_RKSD, rows, attention)
    bounds = Bounds(q_RTHD, k_RKSD, attention, weights=torch.float16, operands=torch.float16)
    assert_within(found, want, magnitude.out_RTHD, bounds)


def _pages(bits: int, planes: Sequence[Tensor]) -> RotatedPages:
    if bits != 3:
        return RotatedPages(*planes)
    codes, high, *others = planes
    return RotatedPages(codes, *others, high=high)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_levels_are_those_of_the_codec(bits: int) -> None:
    assert torch.equal(levels(bits), codebook(bits, torch.device("cpu")).half())


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_rotated_vectors_of_every_width(dim: int, bits: int, interpreted: torch.device) -> None:
    check(replace(BLOCKS, dim_k=dim, dim_v=dim), bits, interpreted)


def test_keys_without_a_mean(interpreted: torch.device) -> None:
    check(replace(BLOCKS, dim_k=128, dim_v=128), 4, interpreted, centred=False)


@pytest.mark.parametrize("bits", [4, 2])
def test_several_query_tokens_with_a_window(bits: int, interpreted: torch.device) -> None:
    batch = replace(BLOCKS, num_tokens=4, has_positions=True, lengths=(110, 0, 70))

    check(batch, bits, interpreted, Attention(scale=0.1, softcap=5.0, window=100))


def test_splits(interpreted: torch.device) -> None:
    check(BLOCKS, 4, interpreted, settings=DecodeSettings(num_splits=3))


def test_blocks_too_short_for_a_matrix_product_are_refused(interpreted: torch.device) -> None:
    with pytest.raises(ValueError, match="64 channels and tokens or more"):
        check(replace(BLOCKS, block_size=32), 2, interpreted)
