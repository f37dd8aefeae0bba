"""Attention of a step in which every sequence has one row, all of them on one rank.

Then nothing waits for others, and what changes from step to step is numbers in tensors of fixed
places: such a step can be recorded as a CUDA graph and run again.

Shape letters: R rows, B blocks of a row, H query heads, K KV heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from kvcluster_kernels.paging import PagedRows
from kvcluster_kernels.rotated_rows import Slots, rotate_and_write
from numpy.typing import NDArray
from torch import Tensor

from kvcluster.attention.decode_selected import SelectedInputs, SelectedShape
from kvcluster.attention.kernel_rows import KernelRows
from kvcluster.attention.part import SequencePart
from kvcluster.attention.row_tables import NOTHING, RowSpan, RowTables, encoded_span, exact_span
from kvcluster.cache.store import KVStore, Places
from kvcluster.types import EXACT

_MAX_POOLS: Final = 64
"""KV groups times ways of storing that one rank's steps may read."""
_WIDTH_STEP: Final = 16


class DecodeShape(NamedTuple):
    """What steps have in common that one recording serves."""

    num_rows: int
    codecs: tuple[tuple[str, ...], ...]
    """By KV group: the codecs that some row reads blocks of."""
    selected: SelectedShape | None = None
    """Of rows that choose what they read, in layers without a window; None: none does."""


class Lines:
    """Lines of numbers, one number a row, written by the host and copied in one go."""

    def __init__(
        self, num_lines: int, max_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        is_pinned = device.type == "cuda"
        self._host = torch.zeros(num_lines, max_rows, dtype=dtype, pin_memory=is_pinned)
        self.host: NDArray[Any] = self._host.numpy()
        self.on_device = torch.zeros(num_lines, max_rows, dtype=dtype, device=device)
        self._copied = torch.cuda.Event() if is_pinned else None  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Wait until what was written before is copied. Comes before new numbers."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy(self, num_lines: int) -> None:
        self.on_device[:num_lines].copy_(self._host[:num_lines], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class _Table:
    """The rows' blocks in one pool: on the device, and what was copied there last."""

    def __init__(self, line: int, max_rows: int, width: int, device: torch.device) -> None:
        self.line = line
        """Of the starts; the ends follow."""
        self.blocks_RB, self.positions_RB = torch.zeros(
            2, max_rows, width, dtype=torch.int32, device=device
        )
        self._copied: list[RowSpan] = [NOTHING] * max_rows

    def update(self, row: int, span: RowSpan) -> None:
        """Copy what is new of a row's blocks, and of their positions if these are told."""
        before = self._copied[row]
        same = min(len(before.blocks_B), len(span.blocks_B))
        told = ((before.blocks_B, span.blocks_B), (before.positions_B, span.positions_B))
        if not all(np.array_equal(earlier[:same], now[:same]) for earlier, now in told):
            same = 0
        self._copied[row] = span
        for plane_RB, (_, now) in zip((self.blocks_RB, self.positions_RB), told, strict=True):
            if same < len(now):
                added = torch.from_numpy(now[same:].astype(np.int32))
                plane_RB[row, same : len(now)].copy_(added)


class DecodeInputs:
    """The tensors that steps of up to `max_rows` rows read. Mutated by `set_rows`."""

    def __init__(self, store: KVStore, *, max_rows: int) -> None:
        self._store = store
        self._spec = store.spec
        self._max_rows = max_rows
        num_groups = len(self._spec.windows)
        # Token ids, positions; then the page and the place there of each group's slots.
        self._numbers = Lines(2 + 2 * num_groups, max_rows, torch.int64, store.device)
        self._bounds = Lines(2 * _MAX_POOLS, max_rows, torch.int32, store.device)
        self._tables: dict[tuple[int, str], _Table] = {}

    def set_rows(self, parts: Sequence[SequencePart], token_ids: Sequence[int]) -> DecodeShape:
        """What the next step computes: the single rows of these parts, all here."""
        num_rows = len(parts)
        assert num_rows <= self._max_rows, "more rows than there is room for"
        self._numbers.begin()
        self._bounds.begin()
        numbers = self._numbers.host
        numbers[0, :num_rows] = token_ids
        numbers[1, :num_rows] = [part.start for part in parts]
        codecs = []
        for group, window in enumerate(self._spec.windows):
            slots = [part.slot(group) for part in parts]
            pages_R, offsets_R = np.divmod(slots, self._store.page_tokens)
            numbers[2 + 2 * group, :num_rows] = pages_R
            numbers[3 + 2 * group, :num_rows] = offsets_R
            codecs.append(self._set_group(parts, group, window))
        self._numbers.copy(len(numbers))
        self._bounds.copy(2 * len(self._tables))
        return DecodeShape(num_rows, tuple(codecs))

    def _set_group(
        self, parts: Sequence[SequencePart], group: int, window: int | None
    ) -> tuple[str, ...]:
        """The codecs that are read of."""
        size = self._store.block_size
        histories = [part.history(group, window) for part in parts]
        self._set_pool(group, EXACT, [exact_span(history, size) for history in histories])
        read = []
        for codec in sorted({part.codec_in(window) for part in parts} - {EXACT}):
            spans = [
                encoded_span(history, part.rank, size)
                if part.codec_in(window) == codec
                else NOTHING
                for part, history in zip(parts, histories, strict=True)
            ]
            if any(span.end for span in spans):
                self._set_pool(group, codec, spans)
                read.append(codec)
        return tuple(read)

    def _set_pool(self, group: int, codec: str, spans: Sequence[RowSpan]) -> None:
        table = self._table(group, codec)
        for row, span in enumerate(spans):
            table.update(row, span)
            self._bounds.host[table.line : table.line + 2, row] = span.start, span.end

    def _table(self, group: int, codec: str) -> _Table:
        found = self._tables.get((group, codec))
        if found is None:
            line = 2 * len(self._tables)
            assert line < len(self._bounds.host), "more pools than there is room for"
            width = self._width(group, codec)
            found = _Table(line, self._max_rows, width, self._store.device)
            self._tables[group, codec] = found
        return found

    def _width(self, group: int, codec: str) -> int:
        """The most blocks that a row reads of a pool."""
        size, window = self._store.block_size, self._spec.windows[group]
        tokens = self._spec.max_context_tokens
        if window is not None:
            tokens = min(tokens, window + size)
        num_blocks = min(-(-tokens // size) + 1, self._store.num_blocks(group, codec))
        return -(-num_blocks // _WIDTH_STEP) * _WIDTH_STEP

    def token_ids(self, num_rows: int) -> Tensor:
        """ids_R."""
        return self._numbers.on_device[0, :num_rows]

    def positions(self, num_rows: int) -> Tensor:
        """positions_R."""
        return self._numbers.on_device[1, :num_rows]

    def places(self, group: int, num_rows: int) -> Places:
        """Where the rows' keys and values go."""
        first = 2 + 2 * group
        return Places(*self._numbers.on_device[first : first + 2, :num_rows])

    def row_tables(self, group: int, shape: DecodeShape) -> RowTables:
        """What the rows read in the group."""
        return RowTables(
            self._paged(group, EXACT, shape.num_rows),
            {codec: self._paged(group, codec, shape.num_rows) for codec in shape.codecs[group]},
        )

    def _paged(self, group: int, codec: str, num_rows: int) -> PagedRows:
        table = self._tables[group, codec]
        starts, ends = self._bounds.on_device[table.line : table.line + 2, :num_rows]
        positions_RB = None if codec == EXACT else table.positions_RB[:num_rows]
        return PagedRows(table.blocks_RB[:num_rows], starts, ends, positions_RB)


class DecodeAttention:
    """A `LayerAttention` over the inputs as they are when it is called. Mutates the store."""

    def __init__(
        self,
        store: KVStore,
        rows: KernelRows,
        inputs: DecodeInputs,
        shape: DecodeShape,
        selected: SelectedInputs | None = None,
    ) -> None:
        """`selected`: of rows that choose what they read."""
        self._shape = shape
        self._selected = selected
        self._positions_R = inputs.positions(shape.num_rows)
        self._store = store
        self._spec = store.spec
        self._rows = rows
        groups = range(len(self._spec.windows))
        self._places = [inputs.places(group, shape.num_rows) for group in groups]
        self._tables = [inputs.row_tables(group, shape) for group in groups]
        self.queries: dict[int, Tensor] = {}
        """q_RHD by layer, as they were given."""

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        geometry = self._spec.layers[layer]
        group = self._spec.group_of(geometry)
        self.queries[layer] = q_THD
        if geometry.kv_layer is None:
            self._store.write(layer, self._places[group], k_TKD, v_TKD)
        return self._read(layer, q_THD, sinks_H)

    def attend_turning(self, layer: int, qkv_RXD: Tensor, cos_RD: Tensor, sin_RD: Tensor) -> Tensor:
        """The same for heads of queries, keys and values in one row that are still to be turned to
        their positions, in a layer that keeps its own keys. out_RHD."""
        group = self._spec.group_of(self._spec.layers[layer])
        slots = Slots(*self._store.planes(layer), *self._places[group])
        q_RHD = rotate_and_write(qkv_RXD, cos_RD, sin_RD, slots)
        self.queries[layer] = q_RHD
        return self._read(layer, q_RHD, None)

    def _read(self, layer: int, q_RHD: Tensor, sinks_H: Tensor | None) -> Tensor:
        geometry, shape = self._spec.layers[layer], self._shape.selected
        if shape is not None and geometry.window is None:
            assert self._selected is not None, "rows that choose without what they compare"
            return self._selected.attend(layer, q_RHD, self._positions_R, shape, sinks_H)
        tables = self._tables[self._spec.group_of(geometry)]
        return self._rows.attend_whole(layer, q_RHD, tables, sinks_H)
