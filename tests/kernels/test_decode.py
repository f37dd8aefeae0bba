"""Decode kernels in Triton's interpreter beside their definitions."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels.combine import combine, combine_plain
from kvcluster_kernels.decode import decode
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, SplitPartials

from tests.kernels.decode_cases import (
    EXACT_BATCHES,
    RAGGED,
    Batch,
    assert_close_to_definition,
    draw_exact,
    draw_queries,
    draw_rows,
)

ATTENTION = Attention(scale=0.3)


def check(
    batch: Batch,
    attention: Attention,
    device: torch.device,
    settings: DecodeSettings | None = None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, device)
    q_RTHD = draw_queries(batch, generator, device)
    pages = draw_exact(batch, rows, generator, device)

    found = decode(q_RTHD, pages, rows, attention, settings)

    assert_close_to_definition(found, q_RTHD, pages, rows, attention)


@pytest.mark.parametrize("batch", EXACT_BATCHES.values(), ids=EXACT_BATCHES)
def test_decode_reads_every_tile_of_a_ragged_batch_and_nothing_else(
    batch: Batch, interpreted: torch.device
) -> None:
    check(batch, ATTENTION, interpreted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_in_half_precision(dtype: torch.dtype, interpreted: torch.device) -> None:
    check(replace(RAGGED, dtype=dtype), ATTENTION, interpreted)


@pytest.mark.parametrize("num_splits", [2, 3, 16])
def test_any_number_of_splits_gives_the_same(num_splits: int, interpreted: torch.device) -> None:
    settings = DecodeSettings(tile=16, num_splits=num_splits)

    check(RAGGED, ATTENTION, interpreted, settings)


@pytest.mark.parametrize("tile", [16, 32])
def test_a_tile_may_be_shorter_or_longer_than_a_block(tile: int, interpreted: torch.device) -> None:
    batch = replace(RAGGED, block_size=32, lengths=(80, 7))

    check(batch, ATTENTION, interpreted, DecodeSettings(tile=tile, num_splits=2))


def test_decode_caps_scores(interpreted: torch.device) -> None:
    check(RAGGED, Attention(scale=0.3, softcap=2.0), interpreted)


@pytest.mark.parametrize("window", [1, 20])
def test_decode_sees_the_window_alone(window: int, interpreted: torch.device) -> None:
    batch = replace(RAGGED, num_tokens=4, has_positions=True)

    check(batch, Attention(scale=0.3, window=window), interpreted)


def test_a_window_without_positions_is_refused() -> None:
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    rows = draw_rows(RAGGED, generator, cpu)
    q_RTHD = draw_queries(RAGGED, generator, cpu)
    pages = draw_exact(RAGGED, rows, generator, cpu)

    with pytest.raises(ValueError, match="a window needs the positions"):
        decode(q_RTHD, pages, rows, Attention(scale=1.0, window=4))


def test_queries_of_another_head_size_are_refused() -> None:
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    rows = draw_rows(RAGGED, generator, cpu)
    pages = draw_exact(RAGGED, rows, generator, cpu)

    with pytest.raises(ValueError, match="do not go together"):
        decode(torch.zeros(4, 1, 4, 32), pages, rows, ATTENTION)


@pytest.mark.parametrize("num_splits", [1, 5, 16, 33])
def test_combine_is_its_definition_whatever_is_in_splits_that_saw_nothing(
    num_splits: int, interpreted: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, num_splits, 8)
    out_RKXMD = torch.randn(*shape, 96, generator=generator)
    lse_RKXM = torch.randn(shape, generator=generator) * 5
    lse_RKXM[1, 1] = -torch.inf
    lse_RKXM[0, :, ::2] = -torch.inf
    out_RKXMD[lse_RKXM == -torch.inf] = torch.nan
    splits = SplitPartials(out_RKXMD, lse_RKXM)

    found = combine(splits, num_tokens=2)

    want = combine_plain(SplitPartials(out_RKXMD.double(), lse_RKXM.double()), num_tokens=2)
    assert torch.equal(found.lse_RTH == -torch.inf, want.lse_RTH == -torch.inf)
    # One rounding of float32 for each split and operation; outputs are of order 1.
    eps = torch.finfo(torch.float32).eps * (num_splits + 16)
    torch.testing.assert_close(found.out_RTHD.double(), want.out_RTHD, rtol=0, atol=4 * eps)
    torch.testing.assert_close(found.lse_RTH.double(), want.lse_RTH, rtol=eps, atol=eps)


def test_rows_are_read_by_their_own_tables(interpreted: torch.device) -> None:
    """A row of a batch is what it is alone."""
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(RAGGED, generator, interpreted)
    q_RTHD = draw_queries(RAGGED, generator, interpreted)
    pages = draw_exact(RAGGED, rows, generator, interpreted)
    settings = DecodeSettings(tile=16, num_splits=2)

    together = decode(q_RTHD, pages, rows, ATTENTION, settings)
    alone = decode(
        q_RTHD[:1],
        pages,
        PagedRows(rows.blocks_RB[:1], rows.starts_R[:1], rows.ends_R[:1]),
        ATTENTION,
        settings,
    )

    assert torch.equal(together.out_RTHD[:1], alone.out_RTHD)


def test_values_that_all_heads_share_are_read_through_a_view(interpreted: torch.device) -> None:
    """Latents of values are one head, in float16, wider than a head of keys."""
    batch = replace(RAGGED, num_kv_heads=2, dim_v=172, dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, interpreted)
    q_RTHD = draw_queries(batch, generator, interpreted)
    pages = draw_exact(batch, rows, generator, interpreted)
    shared = pages._replace(v_PKND=pages.v_PKND[:, :1].expand_as(pages.v_PKND))

    found = decode(q_RTHD, shared, rows, ATTENTION)

    assert_close_to_definition(found, q_RTHD, shared, rows, ATTENTION)
