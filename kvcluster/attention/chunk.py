"""Attention inside one prefill chunk: its rows over each other's keys, wherever they were computed.

Shape letters: T this rank's rows, S keys of the chunk, H query heads, K KV heads, D head dimension.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvcluster.attention.failures import RAISED, READING, Raised
from kvcluster.attention.implementation import Implementation, SwitchingKeys
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial, concatenate
from kvcluster.attention.ring import Ring
from kvcluster.cache.store import (
    KVStore,
    Piece,
    in_blocks,
    in_line,
    keys_and_values,
    stored_arrays,
)
from kvcluster.codec.array import consecutive
from kvcluster.types import EXACT, ModelSpec


class ChunkAttention:
    """Exchanges the chunk's keys between the ranks; all of them call it alike."""

    def __init__(
        self,
        spec: ModelSpec,
        store: KVStore,
        ring: Ring,
        implementation: Implementation,
        failures: Raised = RAISED,
    ) -> None:
        self._spec = spec
        self._store = store
        self._ring = ring
        self._local = implementation
        self._failures = failures

    def attend(
        self, layer: int, part: SequencePart, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor
    ) -> Partial | None:
        """This rank's rows of the part over the chunk's keys and those right before it that are
        read exact; causal. None without rows. q, k and v are of all its packed rows. The rows of a
        part that cannot be computed have seen nothing."""
        near = self._gather(layer, part, k_TKD, v_TKD)
        if near is None:
            return None
        if not self._failures.has(part):
            with self._failures.contain(part, READING):
                return self._attend_near(layer, part, q_THD, near)
        geometry, q_own = self._spec.layers[layer], q_THD[part.rows]
        return Partial.empty(len(q_own), geometry.num_query_heads, geometry.value_dim, q_own)

    def _attend_near(self, layer: int, part: SequencePart, q_THD: Tensor, near: Piece) -> Partial:
        geometry = self._spec.layers[layer]
        near_start = part.near_start(geometry.window)
        encoded = range(
            max(part.block_size, near_start), part.exact_start(part.end - 1), part.block_size
        )
        if part.codec_in(geometry.window) != EXACT and encoded:
            read = self._as_read(layer, part, near, encoded)
            switching = self._attend_switching(layer, part, q_THD, near, read)
            return switching or self._attend_by_blocks(layer, part, q_THD, near, read)
        if part.drops_inside(geometry.window):
            return self._attend_by_blocks(layer, part, q_THD, near, near)
        row = part.row_offset
        partials = []
        for piece in part.own_pieces:
            size = piece.end - piece.start
            q_piece = q_THD[row : row + size]
            partials.append(
                self._local.attend_causal(q_piece, *near, geometry, piece.start - near_start)
            )
            row += size
        return concatenate(partials)

    def _attend_switching(
        self, layer: int, part: SequencePart, q_THD: Tensor, near: Piece, read: Piece
    ) -> Partial | None:
        """The same, a piece of rows at a time; None where that is not offered."""
        geometry = self._spec.layers[layer]
        if part.drops_inside(geometry.window) or part.rules.encoded_step is not None:
            return None
        keys = SwitchingKeys(near, read, part.block_size, part.rules.exact_blocks)
        near_start, row = part.near_start(geometry.window), part.row_offset
        partials = []
        for piece in part.own_pieces:
            q_piece = q_THD[row : row + piece.end - piece.start]
            partial = self._local.attend_switching(
                q_piece, keys, geometry, piece.start - near_start
            )
            if partial is None:
                return None
            partials.append(partial)
            row += len(q_piece)
        return concatenate(partials)

    def _attend_by_blocks(
        self, layer: int, part: SequencePart, q_THD: Tensor, near: Piece, read: Piece
    ) -> Partial:
        """The same, each block of rows by itself: over near keys as they are, over earlier ones as
        they are read, as far as the policy keeps them."""
        geometry = self._spec.layers[layer]
        near_start = part.near_start(geometry.window)
        row = part.row_offset
        partials = []
        for block in _own_blocks(part):
            first, last = block.start - near_start, block.stop - near_start
            low = max(0, part.exact_start(block.start) - near_start)
            if part.drops_inside(geometry.window):
                low = max(low, _recent_start(part, block.start) - near_start)
            q_block = q_THD[row : row + last - first]
            own_keys = _rows(near, slice(low, last))
            own = self._local.attend_causal(q_block, *own_keys, geometry, first - low)
            earlier = _rows(read, slice(low))
            if part.drops_inside(geometry.window):
                earlier = _kept(earlier, part, near_start, block.start)
            seen = self._local.attend_earlier(q_block, *earlier, geometry, gap=first - low)
            partials.append(self._local.merge(seen, own))
            row += last - first
        return concatenate(partials)

    def _as_read(self, layer: int, part: SequencePart, near: Piece, encoded: range) -> Piece:
        """The near keys with the blocks of these first positions as the codec restores them."""
        geometry = self._spec.layers[layer]
        near_start = part.near_start(geometry.window)
        span = slice(encoded.start - near_start, encoded[-1] + part.block_size - near_start)
        blocks = Piece(*(in_blocks(plane[:, span], part.block_size) for plane in near))
        read = [plane.clone() for plane in stored_arrays(near, geometry)]
        for plane, x_KSD in zip(read, self._restored(layer, part, blocks, encoded), strict=True):
            plane[:, span] = x_KSD
        return keys_and_values(read, geometry)

    def _restored(
        self, layer: int, part: SequencePart, blocks: Piece, encoded: range
    ) -> Sequence[Tensor]:
        """Near blocks in line, as the codec restores them: those of this rank, which are encoded
        already, from where they are; for those of other ranks it is found out here."""
        size, here = part.block_size, self._ring.rank
        first, last = encoded.start, encoded[-1] + size
        positions_BS = consecutive(torch.tensor(encoded), size)
        own_starts = torch.from_numpy(part.table.block_starts(here, first, last))
        is_own_B = torch.isin(positions_BS[:, 0], own_starts)
        if not bool(is_own_B.any()):
            return self._store.round_trip(layer, part.codec, blocks, positions_BS)
        group = self._spec.group_of(self._spec.layers[layer])
        ids_B = torch.from_numpy(part.table.encoded_ids(here, group, first, last))
        own: Sequence[Tensor] | None = self._local.restored(layer, part.codec, ids_B)
        if own is None:
            planes = self._store.read_encoded(layer, part.codec, ids_B)
            own = self._store.decode(layer, part.codec, planes, positions_BS[is_own_B])
        if bool(is_own_B.all()):
            return own
        theirs = Piece(*(plane[~is_own_B] for plane in blocks))
        others = self._store.round_trip(layer, part.codec, theirs, positions_BS[~is_own_B])
        order_B = torch.cat((is_own_B.nonzero(), (~is_own_B).nonzero()))[:, 0].argsort()
        return [
            in_line(in_blocks(torch.cat(pair, dim=1), size)[order_B])
            for pair in zip(own, others, strict=True)
        ]

    def _gather(self, layer: int, part: SequencePart, k_TKD: Tensor, v_TKD: Tensor) -> Piece | None:
        """k_KSD and v_KSD of the near keys, everybody's, in order of position; None for a rank
        without rows, which sends its own all the same."""
        geometry = self._spec.layers[layer]
        here, window = self._ring.rank, geometry.window
        num_keys = [
            part.num_near(window, rank) + part.num_rows[rank] for rank in range(self._ring.size)
        ]
        own = self._own_near(layer, part, k_TKD, v_TKD)
        if num_keys[here] == sum(num_keys):
            return keys_and_values(own, geometry) if part.num_rows[here] else None
        others = [rank for rank in range(self._ring.size) if rank != here]
        receivers = [rank for rank in others if part.num_rows[rank] and num_keys[here]]
        senders = [rank for rank in others if part.num_rows[here] and num_keys[rank]]
        received = {
            rank: tuple(
                plane.new_empty((plane.shape[0], num_keys[rank], plane.shape[2])) for plane in own
            )
            for rank in senders
        }
        sent = [plane.contiguous() for plane in own]
        self._ring.exchange(
            [(rank, plane) for rank in receivers for plane in sent],
            [(rank, plane) for rank in senders for plane in received[rank]],
        ).wait()
        if not part.num_rows[here]:
            return None
        received[here] = own
        taken = dict.fromkeys(received, 0)
        pieces: list[list[Tensor]] = []
        for piece in part.near_pieces(window):
            first = taken[piece.rank]
            last = taken[piece.rank] = first + piece.end - piece.start
            pieces.append([plane[:, first:last] for plane in received[piece.rank]])
        near = [torch.cat(planes, dim=1) for planes in zip(*pieces, strict=True)]
        return keys_and_values(near, geometry)

    def _own_near(
        self, layer: int, part: SequencePart, k_TKD: Tensor, v_TKD: Tensor
    ) -> tuple[Tensor, ...]:
        """Those of this rank, as they are sent."""
        geometry = self._spec.layers[layer]
        own = Piece(k_TKD[part.rows].transpose(0, 1), v_TKD[part.rows].transpose(0, 1))
        rows = stored_arrays(own, geometry)
        if not part.num_near(geometry.window, self._ring.rank):
            return rows
        runs = part.near_runs(self._spec.group_of(geometry), geometry.window)
        cached = self._store.gather(layer, runs).planes
        return tuple(torch.cat(planes, dim=1) for planes in zip(cached, rows, strict=True))


def _own_blocks(part: SequencePart) -> Iterator[range]:
    """Positions of this rank's rows, block by block."""
    size = part.block_size
    for piece in part.own_pieces:
        start = piece.start
        while start < piece.end:
            end = min(piece.end, (start // size + 1) * size)
            yield range(start, end)
            start = end


def _recent_start(part: SequencePart, position: int) -> int:
    """First position that the row reads, but for the first block."""
    assert part.recent_blocks is not None
    return max(0, position // part.block_size - part.recent_blocks + 1) * part.block_size


def _kept(earlier: Piece, part: SequencePart, near_start: int, position: int) -> Piece:
    """What the block of `position` reads of these earlier keys: those of the first block and the
    latest ones."""
    num_first = max(0, part.block_size - near_start)
    low = _recent_start(part, position) - near_start
    if low <= num_first:
        return earlier
    return Piece(*(torch.cat([plane[:, :num_first], plane[:, low:]], dim=1) for plane in earlier))


def _rows(kv_KSD: Piece, rows: slice) -> Piece:
    return Piece(kv_KSD.k_PKSD[:, rows], kv_KSD.v_PKSD[:, rows])
