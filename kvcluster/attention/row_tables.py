"""Which blocks of this rank the rows of a decode step read, as kernels want to be told.

Shape letters: R rows, B blocks of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from kvcluster_kernels.paging import PagedRows
from numpy.typing import NDArray

from kvcluster.attention.history import History
from kvcluster.attention.part import FullBlocks, SequencePart
from kvcluster.types import EXACT

_WIDTH_STEP = 16
"""Tables are as wide as a multiple of this: kernels are compiled for such widths."""


class RowSpan(NamedTuple):
    """What one row reads of one pool: tokens [start, end), counted from its first block."""

    blocks_B: NDArray[np.int64]
    start: int
    end: int
    positions_B: NDArray[np.int64]
    """Of the first token of each encoded block; none of exact ones."""


_NONE = np.empty(0, dtype=np.int64)
NOTHING = RowSpan(_NONE, 0, 0, _NONE)


class RowTables(NamedTuple):
    """The history of some rows in one KV group on one rank. All rows are in each table: those that
    read nothing from a pool have no tokens there."""

    exact: PagedRows
    encoded: dict[str, PagedRows]
    """By codec."""


def row_tables(
    parts: Sequence[SequencePart], group: int, window: int | None, device: torch.device
) -> RowTables:
    """Of the single rows of these parts, in layers of one group."""
    histories = [part.history(group, window) for part in parts]
    sizes = [part.block_size for part in parts]
    codecs = dict.fromkeys(part.codec_in(window) for part in parts)
    exact = [exact_span(*each) for each in zip(histories, sizes, strict=True)]
    encoded = {
        codec: [
            encoded_span(history, part.rank, part.block_size)
            if part.codec_in(window) == codec
            else NOTHING
            for part, history in zip(parts, histories, strict=True)
        ]
        for codec in codecs
        if codec != EXACT
    }
    return RowTables(
        paged_rows(exact, device),
        {
            codec: paged_rows(spans, device)
            for codec, spans in encoded.items()
            if any(span.end > span.start for span in spans)
        },
    )


def exact_span(history: History, block_size: int) -> RowSpan:
    """The exact keys of a row's history here. Only its first block may be read from the middle on,
    and only its last one up to the middle."""
    if not history.runs:
        return NOTHING
    blocks_B = np.concatenate(
        [np.arange(run.start // block_size, -(-run.stop // block_size)) for run in history.runs]
    )
    first, last = history.runs[0], history.runs[-1]
    left_over = -last.stop % block_size
    return RowSpan(
        blocks_B, first.start % block_size, len(blocks_B) * block_size - left_over, _NONE
    )


def encoded_span(history: History, rank: int, block_size: int) -> RowSpan:
    """Its encoded keys here: whole blocks but for the start of the first."""
    blocks_B = history.encoded_ids_B.numpy()
    if not len(blocks_B):
        return NOTHING
    held = history.ranks[rank]
    num_tokens = len(blocks_B) * block_size
    return RowSpan(blocks_B, held.num_skipped, num_tokens, held.starts_B.numpy())


def full_span(full: FullBlocks, block_size: int) -> RowSpan:
    """Blocks that became encoded, from end to end."""
    blocks_B = full.encoded_ids_B.numpy()
    return RowSpan(blocks_B, 0, len(blocks_B) * block_size, full.starts_B.numpy())


def paged_rows(spans: Sequence[RowSpan], device: torch.device) -> PagedRows:
    """The spans of a batch, copied to the device in one go."""
    num_rows = len(spans)
    widest = max(1, *(len(span.blocks_B) for span in spans))
    width = -(-widest // _WIDTH_STEP) * _WIDTH_STEP
    has_positions = any(len(span.positions_B) for span in spans)
    sizes = [num_rows * width, num_rows, num_rows, num_rows * width * has_positions]
    numbers = np.zeros(sum(sizes), dtype=np.int32)
    blocks, starts, ends, positions = np.split(numbers, np.cumsum(sizes)[:-1])
    for row, span in enumerate(spans):
        own = slice(row * width, row * width + len(span.blocks_B))
        blocks[own] = span.blocks_B
        starts[row], ends[row] = span.start, span.end
        if has_positions:
            positions[own] = span.positions_B
    on_device = torch.from_numpy(numbers).to(device)
    blocks_X, starts_R, ends_R, positions_X = torch.split(on_device, sizes)
    shape = (num_rows, width)
    return PagedRows(
        blocks_X.view(shape), starts_R, ends_R, positions_X.view(shape) if has_positions else None
    )
