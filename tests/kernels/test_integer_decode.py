"""Decode over integers, as the cache's codecs write them, in Triton's interpreter."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import packed_plain
from kvcluster_kernels.integer_decode import IntegerPages, decode_integers
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from torch import Tensor

from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
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

ATTENTION = Attention(scale=0.1)
BLOCKS = replace(RAGGED, lengths=(110, 0, 1, 123), block_size=64)


def check(
    batch: Batch,
    keys: ChannelQuantizer,
    values: TokenQuantizer,
    device: torch.device,
    attention: Attention = ATTENTION,
    settings: DecodeSettings | None = None,
    decode: Callable[..., Partial] = decode_integers,
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, device)
    q_RTHD = draw_queries(batch, generator, device)
    k = _pages(keys, draw_packed(keys, batch.dim_k, batch, rows, generator))
    v = _pages(values, draw_packed(values, batch.dim_v, batch, rows, generator))

    found = decode(q_RTHD, k, v, rows, attention, settings)

    def magnitude(q_1THD: Tensor, row: PagedRows) -> Partial:
        k_1BKSD = packed_plain.restore_integers(k, row.blocks_RB, batch.dim_k, torch.float64)
        v_1BKDS = packed_plain.restore_integers(v, row.blocks_RB, batch.block_size, torch.float64)
        v_1KSD = packed_plain.in_line(v_1BKDS.transpose(3, 4)).abs() + _spread(v, batch)
        k_1KSD = packed_plain.in_line(k_1BKSD)
        return packed_plain.attend_tokens(q_1THD, k_1KSD, v_1KSD, row, attention)

    want = row_by_row(
        lambda q, row: packed_plain.decode_integers(q, k, v, row, attention), q_RTHD, rows
    )
    magnitude_RTHD = row_by_row(magnitude, q_RTHD, rows).out_RTHD
    k_RBKSD = packed_plain.restore_integers(k, rows.blocks_RB, batch.dim_k, torch.float32)
    # Folded queries are rounded to float16, and so are products of weights and scales.
    bounds = Bounds(q_RTHD, k_RBKSD, attention, weights=torch.float16, operands=torch.float16)
    assert_within(found, want, magnitude_RTHD, bounds)


def _pages(codec: ChannelQuantizer | TokenQuantizer, planes: Sequence[Tensor]) -> IntegerPages:
    if codec.bits != 3:
        return IntegerPages(*planes)
    codes, high, *scales = planes
    return IntegerPages(codes, *scales, high=high)


def _spread(values: IntegerPages, batch: Batch) -> float:
    """What the code part of a value may be more than the value: the largest zero-point."""
    zero = values.zero.float()
    if values.unit is not None:
        scale = (values.scale.to(torch.int16) << 5).view(torch.float16).float()
        zero = zero * scale * values.unit[..., None, None]
    return float(zero[~zero.isnan()].abs().max())


@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 64), (4, 32), (3, 32), (2, 32), (2, 16)])
def test_integers_of_every_width_and_group(
    bits: int, group: int, scale_bits: int, interpreted: torch.device
) -> None:
    check(
        BLOCKS,
        ChannelQuantizer(bits, group=group, scale_bits=scale_bits),
        TokenQuantizer(bits, group=group, scale_bits=scale_bits),
        interpreted,
    )


@pytest.mark.parametrize(("dim", "value_group"), [(96, 32), (128, 64), (256, 64)])
def test_every_head_size(dim: int, value_group: int, interpreted: torch.device) -> None:
    batch = replace(BLOCKS, dim_k=dim, dim_v=dim)

    check(batch, ChannelQuantizer(4), TokenQuantizer(4, group=value_group), interpreted)


def test_keys_and_values_of_different_widths(interpreted: torch.device) -> None:
    batch = replace(BLOCKS, dim_k=128, dim_v=64)

    check(batch, ChannelQuantizer(4), TokenQuantizer(2, group=32), interpreted)


@pytest.mark.parametrize("num_tokens", [4, 16])
def test_several_query_tokens_with_a_window(num_tokens: int, interpreted: torch.device) -> None:
    batch = replace(BLOCKS, num_tokens=num_tokens, has_positions=True, lengths=(110, 0, 70))

    check(
        batch,
        ChannelQuantizer(4),
        TokenQuantizer(4),
        interpreted,
        Attention(scale=0.1, softcap=5.0, window=100),
    )


@pytest.mark.parametrize("num_splits", [2, 3])
def test_any_number_of_splits(num_splits: int, interpreted: torch.device) -> None:
    settings = DecodeSettings(num_splits=num_splits)

    check(BLOCKS, ChannelQuantizer(4), TokenQuantizer(4), interpreted, settings=settings)


def test_codes_too_few_for_a_matrix_product_are_refused(interpreted: torch.device) -> None:
    batch = replace(BLOCKS, block_size=32)

    with pytest.raises(ValueError, match="blocks of 64 tokens or more"):
        check(batch, ChannelQuantizer(2, group=16), TokenQuantizer(2, group=16), interpreted)
