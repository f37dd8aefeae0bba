"""Attention inside one prefill chunk: its rows over each other's keys, wherever they were computed.

Shape letters: T this rank's rows, S keys of the chunk, H query heads, K KV heads, D head dimension.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcluster.attention.local import attend_causal, attend_earlier
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial, concatenate, merge
from kvcluster.attention.ring import Ring
from kvcluster.cache.store import KVStore, Piece
from kvcluster.types import ModelSpec


class ChunkAttention:
    """Exchanges the chunk's keys between the ranks; all of them call it alike."""

    def __init__(self, spec: ModelSpec, store: KVStore, ring: Ring) -> None:
        self._spec = spec
        self._store = store
        self._ring = ring

    def attend(
        self, layer: int, part: SequencePart, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor
    ) -> Partial:
        """This rank's rows of the part, causal. q, k and v are of all its packed rows."""
        geometry = self._spec.layers[layer]
        exact = self._gather(part, k_TKD, v_TKD)
        if part.encoded_at_once or part.drops_inside(geometry.window):
            return self._attend_by_blocks(layer, part, q_THD, exact)
        row = part.row_offset
        partials = []
        for piece in part.own_pieces:
            size = piece.end - piece.start
            q_piece = q_THD[row : row + size]
            partials.append(attend_causal(q_piece, *exact, geometry, piece.start - part.start))
            row += size
        return concatenate(partials)

    def _attend_by_blocks(
        self, layer: int, part: SequencePart, q_THD: Tensor, exact: Piece
    ) -> Partial:
        """The same, each block of rows by itself: over its own keys as they are, over earlier
        blocks of the chunk as they will be read later, as far as the policy keeps them."""
        geometry = self._spec.layers[layer]
        read = self._round_trip(layer, part, exact) if part.encoded_at_once else exact
        row = part.row_offset
        partials = []
        for block in _own_blocks(part):
            first, last = block.start - part.start, block.stop - part.start
            q_block = q_THD[row : row + last - first]
            own = attend_causal(q_block, *_rows(exact, slice(first, last)), geometry, 0)
            earlier = _rows(read, slice(first))
            if part.drops_inside(geometry.window):
                earlier = _kept(earlier, part, block.start)
            partials.append(merge(attend_earlier(q_block, *earlier, geometry), own))
            row += last - first
        return concatenate(partials)

    def _round_trip(self, layer: int, part: SequencePart, exact: Piece) -> Piece:
        """The chunk's keys with every block that is encoded at once as the codec restores it."""
        at_once, size = part.encoded_at_once, part.block_size
        span = slice(at_once.start - part.start, at_once.stop - part.start)
        starts_B = torch.arange(at_once.start, at_once.stop, size)
        blocks = [whole_blocks(plane[:, span].transpose(0, 1), size) for plane in exact]
        read = [plane.clone() for plane in exact]
        for plane, restored in zip(
            read, self._store.round_trip(layer, part.codec, Piece(*blocks), starts_B), strict=True
        ):
            plane[:, span] = restored
        return Piece(*read)

    def _gather(self, part: SequencePart, k_TKD: Tensor, v_TKD: Tensor) -> Piece:
        """k_KSD and v_KSD of the chunk, everybody's, in order of position."""
        own = (k_TKD[part.rows], v_TKD[part.rows])
        if part.num_rows[self._ring.rank] == part.num_tokens:
            return Piece(own[0].transpose(0, 1), own[1].transpose(0, 1))
        others = [
            rank
            for rank in range(self._ring.size)
            if rank != self._ring.rank and part.num_rows[rank]
        ]
        received = {
            rank: tuple(plane.new_empty((part.num_rows[rank], *plane.shape[1:])) for plane in own)
            for rank in others
        }
        self._ring.exchange(
            [(rank, plane) for rank in others for plane in own],
            [(rank, plane) for rank in others for plane in received[rank]],
        ).wait()
        received[self._ring.rank] = own
        taken = dict.fromkeys(received, 0)
        pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
        for piece in part.pieces:
            first = taken[piece.rank]
            last = taken[piece.rank] = first + piece.end - piece.start
            for plane, ordered in zip(received[piece.rank], pieces, strict=True):
                ordered.append(plane[first:last])
        return Piece(torch.cat(pieces[0]).transpose(0, 1), torch.cat(pieces[1]).transpose(0, 1))


def whole_blocks(x_TKD: Tensor, block_size: int) -> Tensor:
    """x_BKSD of tokens that are whole blocks."""
    return x_TKD.reshape(-1, block_size, *x_TKD.shape[1:]).transpose(1, 2)


def _own_blocks(part: SequencePart) -> Iterator[range]:
    """Positions of this rank's rows, block by block."""
    size = part.block_size
    for piece in part.own_pieces:
        start = piece.start
        while start < piece.end:
            end = min(piece.end, (start // size + 1) * size)
            yield range(start, end)
            start = end


def _kept(earlier: Piece, part: SequencePart, position: int) -> Piece:
    """What the block of `position` reads of the chunk's earlier tokens: the first block and the
    latest ones."""
    assert part.recent_blocks is not None
    size = part.block_size
    num_first = max(0, size - part.start)
    low = (position // size - part.recent_blocks + 1) * size - part.start
    if low <= num_first:
        return earlier
    return Piece(*(torch.cat([plane[:, :num_first], plane[:, low:]], dim=1) for plane in earlier))


def _rows(kv_KSD: Piece, rows: slice) -> Piece:
    return Piece(kv_KSD.k_PKSD[:, rows], kv_KSD.v_PKSD[:, rows])
