"""Decode over a list of blocks for each KV head: a list is a block table, heads are rows."""

from dataclasses import replace

import torch
from kvcluster_kernels import decode_plain, packed_plain
from kvcluster_kernels.block_lists import (
    blocks_of_heads,
    heads_as_rows,
    heads_back,
    one_head_pages,
    one_head_planes,
)
from kvcluster_kernels.decode import decode
from kvcluster_kernels.integer_decode import IntegerPages, decode_integers
from kvcluster_kernels.paging import Attention, PagedRows, Partial
from torch import Tensor

from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from tests.kernels.decode_cases import RAGGED, Batch, draw_exact, draw_queries, draw_rows
from tests.kernels.packed_cases import draw_packed

ATTENTION = Attention(scale=0.1)
WHOLE = replace(RAGGED, lengths=(128, 256), skipped=0, block_size=32, page_blocks=3)
_KEPT = 3


def chosen_blocks(batch: Batch, rows: PagedRows) -> Tensor:
    """blocks_RKB: three blocks of each row, other ones for each KV head."""
    generator = torch.Generator().manual_seed(2)
    lists = [
        rows.blocks_RB[row, torch.randperm(count, generator=generator)[:_KEPT]]
        for row, count in enumerate(batch.num_blocks)
        for _ in range(batch.num_kv_heads)
    ]
    return torch.stack(lists).unflatten(0, (len(batch.lengths), batch.num_kv_heads))


def rows_of(blocks_IB: Tensor, block_size: int) -> PagedRows:
    """All tokens of these blocks."""
    starts = torch.zeros(len(blocks_IB), dtype=torch.int32)
    return PagedRows(blocks_IB.contiguous(), starts, starts + _KEPT * block_size)


def head_by_head(whole: list[Partial], num_kv_heads: int) -> Partial:
    """Of partials over the blocks of one KV head each, the query heads that share it."""
    group = whole[0].lse_RTH.shape[2] // num_kv_heads
    parts = [
        Partial(*(x[:, :, head * group : (head + 1) * group] for x in partial))
        for head, partial in enumerate(whole)
    ]
    return Partial(*(torch.cat(x, dim=2) for x in zip(*parts, strict=True)))


def test_each_head_reads_its_blocks_of_exact_pages(interpreted: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(WHOLE, generator, interpreted)
    q_RTHD = draw_queries(WHOLE, generator, interpreted)
    pages = draw_exact(WHOLE, rows, generator, interpreted)
    blocks_RKB = chosen_blocks(WHOLE, rows)
    table = blocks_of_heads(blocks_RKB, page_blocks=WHOLE.page_blocks, is_encoded=False)
    given = heads_as_rows(q_RTHD, rows_of(table, WHOLE.block_size), WHOLE.num_kv_heads)

    found = decode(given.q_RTHD, one_head_pages(pages), given.rows, ATTENTION)

    of_each = [
        decode_plain.decode(q_RTHD, pages, rows_of(blocks_RKB[:, head], 32), ATTENTION)
        for head in range(WHOLE.num_kv_heads)
    ]
    want = head_by_head(of_each, WHOLE.num_kv_heads)
    # Both in float32, of numbers of order 1.
    torch.testing.assert_close(heads_back(found.out_RTHD, 2), want.out_RTHD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(heads_back(found.lse_RTH, 2), want.lse_RTH, rtol=1e-5, atol=1e-5)


def test_each_head_reads_its_blocks_of_encoded_pages(interpreted: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(WHOLE, generator, interpreted)
    q_RTHD = draw_queries(WHOLE, generator, interpreted)
    keys = IntegerPages(*draw_packed(ChannelQuantizer(4), 64, WHOLE, rows, generator))
    values = IntegerPages(*draw_packed(TokenQuantizer(4), 64, WHOLE, rows, generator))
    blocks_RKB = chosen_blocks(WHOLE, rows)
    table = blocks_of_heads(blocks_RKB, page_blocks=WHOLE.page_blocks, is_encoded=True)
    given = heads_as_rows(q_RTHD, rows_of(table, WHOLE.block_size), WHOLE.num_kv_heads)
    one_head = (
        IntegerPages(*(None if x is None else one_head_planes(x) for x in pages))
        for pages in (keys, values)
    )

    found = decode_integers(given.q_RTHD, *one_head, given.rows, ATTENTION)

    of_each = [
        packed_plain.decode_integers(
            q_RTHD, keys, values, rows_of(blocks_RKB[:, head], 32), ATTENTION
        )
        for head in range(WHOLE.num_kv_heads)
    ]
    want = head_by_head(of_each, WHOLE.num_kv_heads)
    # Queries and weights are rounded to float16: 2^-11 of scores of about 10 and of their values.
    torch.testing.assert_close(heads_back(found.out_RTHD, 2), want.out_RTHD, rtol=0, atol=2e-2)
    torch.testing.assert_close(heads_back(found.lse_RTH, 2), want.lse_RTH, rtol=0, atol=2e-2)
