"""Rows of decode that choose their blocks by bounds, all on one rank, in tensors of fixed places.

As `decode_step`, which see: such a step can be recorded as a CUDA graph. What is known of a
sequence's keys lies elsewhere whenever a block has been filled, so that kernels are told where.

Shape letters: R rows, B blocks, W blocks that there is room for, K KV heads, H query heads, D head
dimension.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple
from weakref import ReferenceType, ref

import torch
from kvcluster_kernels.block_bounds import BoundsOfRows, largest_bounds_of_rows
from kvcluster_kernels.chosen_blocks import MAX_BLOCKS, Candidates, row_tables
from torch import Tensor

from kvcluster.attention.chosen_reasons import reason_against
from kvcluster.attention.kernel_rows import KernelRows
from kvcluster.attention.kernel_selected import part_blocks
from kvcluster.attention.selected_part import SelectedPart, Selecting
from kvcluster.cache.store import KVStore
from kvcluster.selection.quest import Quest
from kvcluster.types import EXACT

_LEAST_WIDTH: Final = 128


class SelectedShape(NamedTuple):
    """What steps have in common that one recording serves."""

    width: int
    """Blocks that there is room for."""
    codec: str


class _Copied(NamedTuple):
    """What is on the device of a row."""

    selecting: ReferenceType[Selecting]
    own_block: int


class SelectedInputs:
    """The tensors that such steps of up to `max_rows` rows read. Mutated by `set_rows`."""

    def __init__(self, store: KVStore, rows: KernelRows, *, max_rows: int) -> None:
        self._store = store
        self._spec = store.spec
        self._rows = rows
        choosing = [i for i, layer in enumerate(self._spec.layers) if layer.window is None]
        self._layers = sorted({self._spec.kv_layer_of(layer) for layer in choosing})
        """Those whose keys are known."""
        self._max_rows = max_rows
        device = store.device
        self._places = torch.zeros(len(self._layers), 2, max_rows, dtype=torch.int64, device=device)
        # Blocks that are known, and blocks to pick.
        self._numbers = torch.zeros(2, max_rows, dtype=torch.int32, device=device)
        most = -(-self._spec.max_context_tokens // store.block_size) + 1
        room = max_rows * min(MAX_BLOCKS, _width(most))
        # Recordings read them where they are, of whatever width.
        self._flags = torch.zeros(room, dtype=torch.uint8, device=device)
        self._ids = torch.zeros(2 * room, dtype=torch.int32, device=device)
        self._width = 0
        self._copied: list[_Copied | None] = [None] * max_rows

    def serves(self, parts: Sequence[SelectedPart]) -> bool:
        """Whether these parts, each of one row, all of whose blocks are here, choose by bounds
        among all blocks, in layers that kernels serve, and are stored alike."""
        return len({part.part.codec for part in parts}) == 1 and all(map(self._serves_part, parts))

    def _serves_part(self, part: SelectedPart) -> bool:
        if not self._layers or type(part) is not SelectedPart:
            return False
        has_all = part.part.recent_blocks is None and not part.num_prompt_rows
        if not isinstance(part.selecting.selection, Quest) or not has_all:
            return False
        size, blocks = part.part.block_size, part.num_blocks
        return not any(
            reason_against(layer, block_size=size, num_blocks=_width(blocks), has_rows=True)
            for layer in self._spec.layers
            if layer.window is None
        )

    def set_rows(self, parts: Sequence[SelectedPart]) -> SelectedShape:
        """What the next step reads. The rows are known by their blocks before the own one."""
        width = _width(max(part.num_blocks for part in parts))
        if width != self._width:
            self._width = width
            self._copied = [None] * self._max_rows
        for row, part in enumerate(parts):
            own_block = part.part.start // part.part.block_size
            copied = self._copied[row]
            is_there = (
                copied is not None
                and copied.selecting() is part.selecting
                and copied.own_block == own_block
            )
            if not is_there:
                self._copy(row, part, width)
                self._copied[row] = _Copied(ref(part.selecting), own_block)
        return SelectedShape(width, parts[0].part.codec)

    def _copy(self, row: int, part: SelectedPart, width: int) -> None:
        group = self._spec.group_of(self._spec.layers[self._layers[0]])
        found = part_blocks(part, part.own_blocks(group))
        assert found.num_J is not None, "bounds are compared"
        flags_RW, ids_2RW = self._flags_and_ids(width)
        num_blocks = part.num_blocks
        flags_RW[row].zero_()
        flags_RW[row, :num_blocks].copy_(found.flags_JB[0])
        ids_2RW[0, row, :num_blocks].copy_(found.exact_ids_B)
        if found.encoded_ids_B is not None:
            ids_2RW[1, row, :num_blocks].copy_(found.encoded_ids_B)
        places = [[0, 0]] * len(self._layers)
        num_known = 0
        for place, layer in enumerate(self._layers):
            kept = part.selecting.kept(layer)
            if kept is not None:
                places[place] = [kept.keys.low_KBD.data_ptr(), kept.keys.high_KBD.data_ptr()]
                num_known = len(kept.blocks_B)
        self._places[:, :, row].copy_(torch.tensor(places, dtype=torch.int64))
        self._numbers[0, row] = num_known
        self._numbers[1, row].copy_(found.num_J[0])

    def _flags_and_ids(self, width: int) -> tuple[Tensor, Tensor]:
        size = self._max_rows * width
        return (
            self._flags[:size].view(self._max_rows, width),
            self._ids[: 2 * size].view(2, self._max_rows, width),
        )

    def attend(
        self,
        layer: int,
        q_RHD: Tensor,
        positions_R: Tensor,
        shape: SelectedShape,
        sinks_H: Tensor | None,
    ) -> Tensor:
        """out_RHD of rows at these positions over what they choose, in q's dtype."""
        geometry, num_rows = self._spec.layers[layer], len(q_RHD)
        low_R, high_R = self._places[
            self._layers.index(self._spec.kv_layer_of(layer)), :, :num_rows
        ]
        counts_R, num_R = self._numbers[:, :num_rows]
        num_choosing = geometry.num_kv_heads
        bound_KRW = largest_bounds_of_rows(
            q_RHD,
            BoundsOfRows(low_R, high_R, counts_R, num_choosing),
            width=shape.width,
            scale=geometry.scale,
        )
        left_R = self._store.block_size - 1 - positions_R % self._store.block_size
        flags_RW, (exact_ids_RW, encoded_ids_RW) = self._flags_and_ids(shape.width)
        is_encoded = shape.codec != EXACT
        ids = (exact_ids_RW[:num_rows], encoded_ids_RW[:num_rows] if is_encoded else None)
        exact_rows, encoded_rows = row_tables(
            bound_KRW,
            Candidates(flags_RW[:num_rows], num_R),
            left_R.int(),
            self._rows.chosen_pools(layer, shape.codec, ids, num_choosing),
        )
        encoded = (shape.codec, encoded_rows)
        return self._rows.attend_chosen(layer, q_RHD, num_choosing, exact_rows, encoded, sinks_H)


def _width(num_blocks: int) -> int:
    """Kernels look at powers of two."""
    return max(_LEAST_WIDTH, 1 << (num_blocks - 1).bit_length())
