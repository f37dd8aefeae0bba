"""Decode over integer keys beside rotated values, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels.mixed_decode import decode_mixed
from kvcluster_kernels.paging import Attention

from kvcluster.codec.quantized import ChannelQuantizer
from tests.kernels.decode_cases import RAGGED, draw_queries, draw_rows
from tests.kernels.mixed_cases import check, pages

BLOCKS = replace(RAGGED, lengths=(110, 0, 1, 123), block_size=64)


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        (ChannelQuantizer(4), 3),
        (ChannelQuantizer(4, scale_bits=8), 3),
        (ChannelQuantizer(4, group=16), 2),
        (ChannelQuantizer(8, group=32), 4),
        (ChannelQuantizer(3), 4),
        (ChannelQuantizer(2, group=32), 2),
    ],
    ids=str,
)
def test_every_width(codec: ChannelQuantizer, bits: int, interpreted: torch.device) -> None:
    check(BLOCKS, codec, bits, interpreted)


def test_several_query_tokens_with_a_window(interpreted: torch.device) -> None:
    batch = replace(BLOCKS, num_tokens=4, has_positions=True)

    check(batch, ChannelQuantizer(4), 3, interpreted, Attention(scale=0.1, softcap=5.0, window=100))


def test_groups_of_keys_that_fit_no_part_are_refused(interpreted: torch.device) -> None:
    rows = draw_rows(BLOCKS, torch.Generator().manual_seed(0), interpreted)
    q_RTHD = draw_queries(BLOCKS, torch.Generator().manual_seed(0), interpreted)
    k, v = pages(ChannelQuantizer(4, group=16), 4, BLOCKS, rows)

    with pytest.raises(ValueError, match="4 groups of keys in a block do not fit 2 parts"):
        decode_mixed(q_RTHD, k, v, torch.eye(BLOCKS.dim_v), rows, Attention(scale=0.1))
