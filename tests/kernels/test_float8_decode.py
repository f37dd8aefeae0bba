"""Decode over e4m3 floats, as the cache's codec writes them, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import packed_plain
from kvcluster_kernels.float8_decode import Float8Pages, decode_float8
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from torch import Tensor

from kvcluster.codec.float8 import Float8
from tests.kernels.decode_cases import (
    RAGGED,
    Batch,
    Bounds,
    assert_within,
    draw_queries,
    draw_rows,
    row_by_row,
)
from tests.kernels.packed_cases import draw_packed

BLOCKS = replace(RAGGED, lengths=(110, 0, 1, 123), block_size=64)


def check(
    batch: Batch,
    device: torch.device,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, device)
    q_RTHD = draw_queries(batch, generator, device)
    k = Float8Pages(*draw_packed(Float8(), batch.dim_k, batch, rows, generator))
    v = Float8Pages(*draw_packed(Float8(transposed=True), batch.dim_v, batch, rows, generator))

    found = decode_float8(q_RTHD, k, v, rows, attention, settings)

    def magnitude(q_1THD: Tensor, row: PagedRows) -> Partial:
        k_1BKSD = packed_plain.restore_float8(k, row.blocks_RB, torch.float64)
        v_1BKDS = packed_plain.restore_float8(v, row.blocks_RB, torch.float64).abs()
        k_1KSD, v_1KSD = (packed_plain.in_line(x) for x in (k_1BKSD, v_1BKDS.transpose(3, 4)))
        return packed_plain.attend_tokens(q_1THD, k_1KSD, v_1KSD, row, attention)

    want = row_by_row(
        lambda q, row: packed_plain.decode_float8(q, k, v, row, attention), q_RTHD, rows
    )
    magnitude_RTHD = row_by_row(magnitude, q_RTHD, rows).out_RTHD
    k_RBKSD = packed_plain.restore_float8(k, rows.blocks_RB, torch.float32)
    # Queries are rounded to float16, and so are weights.
    bounds = Bounds(q_RTHD, k_RBKSD, attention, weights=torch.float16, operands=torch.float16)
    assert_within(found, want, magnitude_RTHD, bounds)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_every_head_size(dim: int, interpreted: torch.device) -> None:
    check(replace(BLOCKS, dim_k=dim, dim_v=dim), interpreted, Attention(scale=0.1))


@pytest.mark.parametrize("block_size", [16, 128])
def test_every_block_size(block_size: int, interpreted: torch.device) -> None:
    check(replace(BLOCKS, block_size=block_size), interpreted, Attention(scale=0.1))


def test_several_query_tokens_with_a_window(interpreted: torch.device) -> None:
    batch = replace(BLOCKS, num_tokens=8, has_positions=True, lengths=(110, 0, 70))

    check(batch, interpreted, Attention(scale=0.1, softcap=5.0, window=100))


def test_splits(interpreted: torch.device) -> None:
    settings = DecodeSettings(num_splits=3)

    check(BLOCKS, interpreted, Attention(scale=0.1), settings)
