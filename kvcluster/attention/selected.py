"""Attention of rows that choose which blocks they read, wherever the blocks lie.

Queries travel, whatever route the plan names: what a row reads is known only where the row is, and
is little. For each layer without a window of the model's own,

1. rows go to all ranks that hold what some of them may read;
2. each of these scores its own blocks and tells the others, so that all pick the same blocks, by
   the same numbers;
3. each attends over the picked blocks that it holds, and the partials go back to be merged.

The rows of a chunk are written before they are read, so the chunk's own keys need no way of their
own: a row reads its own block, and blocks that are exact to it, as they were written; other blocks
of the chunk as they are encoded by then.

Shape letters: T rows, J query blocks, B blocks, S keys, H query heads, K KV heads, G heads that
choose, D head dimension.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcluster.attention.failures import RAISED, Raised
from kvcluster.attention.implementation import ChosenAttention
from kvcluster.attention.local import attend, attend_causal
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial, concatenate, merge
from kvcluster.attention.ring import Message, Ring
from kvcluster.attention.selected_part import RankBlocks, SelectedPart, Tile
from kvcluster.cache.store import KVStore, Piece, in_blocks, in_line, keys_and_values
from kvcluster.selection.base import KeySummaries, pooled
from kvcluster.selection.need import Need
from kvcluster.types import LayerGeometry, ModelSpec

SELECTING: Final = "choosing what to read"


class _Restored(NamedTuple):
    """Blocks as the codec gives them back, of those that are read so."""

    kv_BKSD: Piece
    places_B: Tensor
    """Where each block of this rank is in them; -1: not there."""


class SelectedAttention:
    """The selecting parts of one step over one rank's store. All ranks call it alike."""

    def __init__(
        self,
        spec: ModelSpec,
        store: KVStore,
        ring: Ring,
        parts: Sequence[SelectedPart],
        chosen: ChosenAttention | None = None,
        failures: Raised = RAISED,
    ) -> None:
        """`chosen`: attention over picked blocks that are here; None: as it is defined."""
        self._failures = failures
        self._chosen = chosen
        self._spec = spec
        self._store = store
        self._ring = ring
        self._parts = parts
        self._choosing = [part for part in parts if part.is_choosing]
        self._blocks: dict[SelectedPart, RankBlocks] = {}

    def serves(self, layer: int, part: SequencePart) -> bool:
        """Whether rows of the part choose in the layer, and are attended here."""
        if self._spec.layers[layer].window is not None:
            return False
        return any(chosen.part is part for chosen in self._choosing)

    def keep(self, layer: int) -> None:
        """Sum up the blocks that are full now. Called when the step's rows have been written."""
        keep_filled(self._spec, self._store, layer, self._parts, self._failures)

    def knows_keys(self, part: SequencePart) -> bool:
        """Whether something is kept of the keys of the part's blocks."""
        return any(
            chosen.part is part and chosen.selecting.selection.needs is not Need.NOTHING
            for chosen in self._parts
        )

    def keep_survivors(
        self, layer: int, part: SequencePart, blocks_B: Tensor, k_KSD: Tensor
    ) -> None:
        """Know the survivors of an epoch that has ended, in place of all blocks until then:
        the blocks of their lists on this rank, and their keys as they are read."""
        for chosen in self._parts:
            if chosen.part is part:
                chosen.selecting.replace(layer, blocks_B, k_KSD, part.block_size)

    def forget(self, layer: int) -> None:
        """Drop what no row after this step may read. Called when the layer has attended."""
        if self._spec.layers[layer].window is not None or not self._spec.is_last_reader(layer):
            return
        source = self._spec.kv_layer_of(layer)
        for part in self._parts:
            if not self._failures.has(part.part):
                part.selecting.forget(source, part.part.end // part.part.block_size)

    def attend(self, layer: int, q_THD: Tensor) -> dict[SequencePart, Partial]:
        """Partials of this rank's rows over all that they read, by part."""
        if self._spec.layers[layer].window is not None or not self._choosing:
            return {}
        queries = self._send_queries(q_THD, layer)
        scores = self._exchange_scores(layer, queries)
        answers = {
            part: self._read_contained(layer, part, q_rows, scores[part])
            for part, q_rows in queries.items()
        }
        return self._collect(layer, answers, q_THD)

    def _send_queries(self, q_THD: Tensor, layer: int) -> dict[SelectedPart, Tensor]:
        """All rows of the parts of which this rank holds something, in order of position."""
        here, geometry = self._ring.rank, self._spec.layers[layer]
        sends: list[Message] = []
        receives: list[Message] = []
        rows: dict[SelectedPart, dict[int, Tensor]] = {}
        for part in self._choosing:
            own = q_THD[part.part.rows].contiguous()
            if len(own):
                sends += [(rank, own) for rank in part.holders if rank != here]
            if here in part.holders:
                rows[part] = {
                    rank: own
                    if rank == here
                    else q_THD.new_empty((num_rows, geometry.num_query_heads, geometry.key_dim))
                    for rank, num_rows in enumerate(part.part.num_rows)
                    if num_rows
                }
                receives += [(rank, q_rows) for rank, q_rows in rows[part].items() if rank != here]
        self._ring.exchange(sends, receives).wait()
        return {part: _in_order(part, by_rank) for part, by_rank in rows.items()}

    def _exchange_scores(
        self, layer: int, queries: dict[SelectedPart, Tensor]
    ) -> dict[SelectedPart, Tensor]:
        """score_GJB of all blocks, whoever holds them; without blocks where none are compared."""
        here, geometry = self._ring.rank, self._spec.layers[layer]
        sends: list[Message] = []
        receives: list[Message] = []
        found: dict[SelectedPart, dict[int, Tensor]] = {}
        for part, q_THD in queries.items():
            selection, num_queries = part.selecting.selection, len(part.query_blocks.own_J)
            if selection.needs is Need.NOTHING:
                continue
            shape = (selection.num_choosing(geometry), num_queries)
            scores = {
                rank: torch.zeros(*shape, len(part.compared_blocks[rank]), device=q_THD.device)
                for rank in part.holders
            }
            if scores[here].numel() and not self._failures.has(part.part):
                with self._failures.contain(part.part, SELECTING):
                    source = self._spec.kv_layer_of(layer)
                    keys = part.selecting.of(source, part.compared_blocks[here])
                    scores[here] = self._scores(geometry, part, q_THD, keys)
            sends += [(rank, scores[here]) for rank in part.holders if rank != here]
            receives += [(rank, scores[rank]) for rank in part.holders if rank != here]
            found[part] = scores
        self._ring.exchange(sends, receives).wait()
        return {part: self._joined(part, found.get(part, {}), queries[part]) for part in queries}

    def _scores(
        self, geometry: LayerGeometry, part: SelectedPart, q_THD: Tensor, keys: KeySummaries
    ) -> Tensor:
        if self._chosen is not None:
            scores = self._chosen.scores(geometry, part, q_THD, keys)
            if scores is not None:
                return scores
        q_JHD = pooled(q_THD, part.query_blocks)
        return part.selecting.selection.scores(geometry, q_JHD, keys).contiguous()

    def _joined(self, part: SelectedPart, scores: dict[int, Tensor], like: Tensor) -> Tensor:
        if not scores:
            return torch.empty(1, len(part.query_blocks.own_J), 0, device=like.device)
        if part.has_all_blocks:
            [score_GJS] = scores.values()
            return pad(score_GJS, (0, part.num_blocks - score_GJS.shape[2]))
        shape = next(iter(scores.values())).shape[:2]
        whole_GJB = torch.zeros(*shape, part.num_blocks, device=like.device)
        for rank, score_GJB in scores.items():
            whole_GJB[:, :, part.compared_blocks[rank]] = score_GJB
        return whole_GJB

    def _read_contained(
        self, layer: int, part: SelectedPart, q_THD: Tensor, score_GJB: Tensor
    ) -> Partial:
        if not self._failures.has(part.part):
            with self._failures.contain(part.part, SELECTING):
                return self._read(layer, part, q_THD, score_GJB)
        num_rows, num_heads, _ = q_THD.shape
        return Partial.empty(num_rows, num_heads, self._spec.layers[layer].value_dim, q_THD)

    def _read(self, layer: int, part: SelectedPart, q_THD: Tensor, score_GJB: Tensor) -> Partial:
        """All rows of the part over what they read here, in order of position."""
        blocks = self._own_blocks(layer, part)
        if self._chosen is not None:
            found = self._chosen.attend(layer, part, blocks, q_THD, score_GJB)
            if found is not None:
                return found
        reads_GJB = part.selecting.selection.choose(
            layer, part.query_blocks, part.readable_blocks, score_GJB
        )[:, :, blocks.blocks_B]
        restored = self._restore(layer, part, blocks, reads_GJB)
        return concatenate(
            [
                self._attend_tile(layer, part, tile, q_THD[tile.rows], reads_GJB, restored)
                for tile in part.tiles
            ]
        )

    def _own_blocks(self, layer: int, part: SelectedPart) -> RankBlocks:
        """The same in all layers without a window: they are one group."""
        if part not in self._blocks:
            group = self._spec.group_of(self._spec.layers[layer])
            self._blocks[part] = part.own_blocks(group)
        return self._blocks[part]

    def _restore(
        self, layer: int, part: SelectedPart, blocks: RankBlocks, reads_GJB: Tensor
    ) -> _Restored | None:
        """Decode what some row reads encoded."""
        is_read_JB = reads_GJB.any(dim=0)
        is_read_B = torch.zeros_like(is_read_JB[0])
        for tile in part.tiles:
            is_read_B |= is_read_JB[tile.query_blocks].any(dim=0) & tile.is_far_B
        if not bool(is_read_B.any()):
            return None
        read_B = is_read_B.nonzero()[:, 0]
        codec, source = part.part.codec, self._spec.kv_layer_of(layer)
        planes = self._store.read_encoded(layer, codec, blocks.encoded_ids_B[read_B])
        positions_BS = part.encoded_positions(source, blocks.blocks_B[read_B])
        restored = self._store.decode(layer, codec, planes, positions_BS)
        arrays = [in_blocks(x_KSD, part.part.block_size) for x_KSD in restored]
        places_B = torch.full_like(blocks.blocks_B, -1)
        places_B[read_B] = torch.arange(len(read_B), device=read_B.device)
        return _Restored(keys_and_values(arrays, self._spec.layers[layer]), places_B)

    def _attend_tile(
        self,
        layer: int,
        part: SelectedPart,
        tile: Tile,
        q_THD: Tensor,
        reads_GJB: Tensor,
        restored: _Restored | None,
    ) -> Partial:
        """Rows of one block over the blocks here that they read: earlier ones, and their own."""
        geometry, blocks = self._spec.layers[layer], self._own_blocks(layer, part)
        reads_GJB = reads_GJB[:, tile.query_blocks]
        is_read_GB = reads_GJB.any(dim=1)
        partials = []
        for choosing, is_read_B in enumerate(is_read_GB):
            q_heads = _share(choosing, len(reads_GJB), geometry.num_query_heads)
            kv_heads = _share(choosing, len(reads_GJB), geometry.num_kv_heads)
            far_B = (is_read_B & tile.is_far_B).nonzero()[:, 0]
            near_B = (is_read_B & tile.is_near_B).nonzero()[:, 0]
            pieces = [self._store.read_blocks(layer, blocks.exact_ids_B[near_B], kv_heads)]
            if restored is not None and len(far_B):
                places_B = restored.places_B[far_B]
                pieces.insert(0, Piece(*(x[places_B, kv_heads] for x in restored.kv_BKSD)))
            k_KSD, v_KSD = (in_line(torch.cat(planes)) for planes in zip(*pieces, strict=True))
            read_B = torch.cat((far_B, near_B))
            mask_TS = _mask(part, tile, reads_GJB[choosing][:, read_B])
            held_S = part.held_tokens(blocks.blocks_B[read_B])
            if held_S is not None:
                k_KSD, v_KSD = k_KSD[:, held_S], v_KSD[:, held_S]
                mask_TS = None if mask_TS is None else mask_TS[:, held_S]
            partials.append(attend(q_THD[:, q_heads], k_KSD, v_KSD, geometry, mask_TS))
        earlier = Partial(*(torch.cat(planes, dim=1) for planes in zip(*partials, strict=True)))
        own = self._attend_own(layer, part, tile, q_THD)
        return earlier if own is None else merge(earlier, own)

    def _attend_own(
        self, layer: int, part: SelectedPart, tile: Tile, q_THD: Tensor
    ) -> Partial | None:
        """Rows over their own block; None where another rank has it."""
        blocks = self._own_blocks(layer, part)
        place_B = (blocks.blocks_B == tile.own).nonzero()[:, 0]
        if not len(place_B):
            return None
        first = (part.part.start + tile.rows.start) % part.part.block_size
        k_KSD, v_KSD = (
            in_line(plane)[:, : first + len(q_THD)]
            for plane in self._store.read_blocks(layer, blocks.exact_ids_B[place_B])
        )
        return attend_causal(q_THD, k_KSD, v_KSD, self._spec.layers[layer], first)

    def _collect(
        self, layer: int, answers: dict[SelectedPart, Partial], q_THD: Tensor
    ) -> dict[SequencePart, Partial]:
        """Send partials back to their rows, and merge those of this rank's rows."""
        here, geometry = self._ring.rank, self._spec.layers[layer]
        heads, value_dim = geometry.num_query_heads, geometry.value_dim
        sends: list[Message] = []
        receives: list[Message] = []
        found: dict[SequencePart, list[Partial]] = {}
        for part in self._choosing:
            for rank, num_rows in enumerate(part.part.num_rows):
                if not num_rows or here not in part.holders:
                    continue
                answer = answers[part]
                if num_rows < part.part.num_tokens:
                    answer = Partial(*(plane[part.offsets[rank]] for plane in answer))
                if rank == here:
                    found[part.part] = [answer]
                else:
                    sends += [(rank, plane) for plane in answer]
            if part.part.num_rows[here]:
                for rank in part.holders:
                    if rank != here:
                        room = Partial.room(part.part.num_rows[here], heads, value_dim, q_THD)
                        receives += [(rank, plane) for plane in room]
                        found[part.part].append(room)
        self._ring.exchange(sends, receives).wait()
        return {part: merge(*partials) for part, partials in found.items()}


def keep_filled(
    spec: ModelSpec,
    store: KVStore,
    layer: int,
    parts: Sequence[SelectedPart],
    failures: Raised = RAISED,
) -> None:
    """Sum up the blocks that rows of the parts, which are written, leave full in a layer."""
    geometry = spec.layers[layer]
    if geometry.window is not None or geometry.kv_layer is not None:
        return
    group = spec.group_of(geometry)
    for part in parts:
        if part.selecting.selection.needs is Need.NOTHING or failures.has(part.part):
            continue
        blocks_B = part.filled_blocks
        if len(blocks_B):
            with failures.contain(part.part, SELECTING):
                k_BKSD, _ = store.read_blocks(layer, part.filled_ids(group))
                part.selecting.add(layer, blocks_B, k_BKSD)


def _in_order(part: SelectedPart, by_rank: dict[int, Tensor]) -> Tensor:
    """Rows of several ranks, in order of position."""
    if len(by_rank) == 1:
        return next(iter(by_rank.values()))
    like = next(iter(by_rank.values()))
    q_THD = like.new_empty((part.part.num_tokens, *like.shape[1:]))
    for rank, q_rows in by_rank.items():
        q_THD[part.offsets[rank]] = q_rows
    return q_THD


def _mask(part: SelectedPart, tile: Tile, reads_JB: Tensor) -> Tensor | None:
    """mask_TS of a tile's rows over these blocks; None: each row reads each of them."""
    if len(reads_JB) == 1 or bool(reads_JB.all()):
        return None
    reads_TB = reads_JB.repeat_interleave(part.query_blocks.num_rows_J[tile.query_blocks], dim=0)
    return reads_TB.repeat_interleave(part.part.block_size, dim=1)


def _share(choosing: int, num_choosing: int, num_heads: int) -> slice:
    """Heads that belong to one of those that choose: several, or the one that several share."""
    first = choosing * num_heads // num_choosing
    return slice(first, max(first + 1, (choosing + 1) * num_heads // num_choosing))
