"""What a rank reads of its own cache for the rows of a step, whoever has these rows.

Shape letters: T query rows, S keys, H query heads, K KV heads, D head dimension, B blocks.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kvcluster.attention.encoded import EncodedKeys, attend_encoded
from kvcluster.attention.failures import RAISED, READING, Raised
from kvcluster.attention.history import History, RankHistory
from kvcluster.attention.implementation import Implementation
from kvcluster.attention.local import attend_pieces
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial, merge
from kvcluster.cache.store import KVStore, Piece, keys_and_values
from kvcluster.codec.base import EncodedKV
from kvcluster.types import EXACT

_PIECE_BLOCKS: Final = 1024
"""Encoded blocks of a chunk's history that are restored at a time: with 64 tokens each, keys enough
that a kernel runs at full speed, and 0.4 GiB at most for 8 heads of 128 while they are restored."""


class OwnKeys:
    """The keys of one rank, layer by layer: `forget` begins the next. Reads the store.

    Of a part that cannot be read, `attend` has seen nothing, and `shard` and `keys` are zeros."""

    def __init__(
        self,
        store: KVStore,
        rank: int,
        implementation: Implementation,
        failures: Raised = RAISED,
    ) -> None:
        self._spec = store.spec
        self._store = store
        self._rank = rank
        self._local = implementation
        self._failures = failures
        self._parts: dict[SequencePart, Piece] = {}
        """Of the layer in hand: the keys here, read once for all who ask."""
        self._pieces: dict[SequencePart, list[Piece]] = {}
        """Of the layer in hand: the exact keys that single rows read."""

    def forget(self) -> None:
        """What was read of the layer before."""
        self._parts.clear()
        self._pieces.clear()

    def prepare(self, layer: int, part: SequencePart) -> None:
        """Read ahead what `attend` will need of the part."""
        with self._failures.contain(part, READING):
            if part.has_chunk:
                if not self._is_read_in_pieces(layer, part):
                    self.keys(layer, part)
            elif not self._is_together(layer, part):
                self._exact_pieces(layer, part)

    def attend(
        self, layer: int, parts: Sequence[SequencePart], queries: Sequence[Tensor], asker: int
    ) -> list[Partial]:
        """The rows of a rank, part by part, over the parts' keys here."""
        together = [part for part in parts if self._is_together(layer, part)]
        found: dict[SequencePart, Partial] = {}
        if together and self._local.rows is not None:
            rows = [q for part, q in zip(parts, queries, strict=True) if part in together]
            whole = self._local.rows.attend(layer, together, torch.cat(rows))
            for row, part in enumerate(together):
                found[part] = Partial(*(plane[row : row + 1] for plane in whole))
        return [
            found[part] if part in found else self._attend_contained(layer, part, q_THD, asker)
            for part, q_THD in zip(parts, queries, strict=True)
        ]

    def _is_together(self, layer: int, part: SequencePart) -> bool:
        return self._local.rows is not None and self._local.rows.serves(layer, part)

    def _attend_contained(
        self, layer: int, part: SequencePart, q_THD: Tensor, asker: int
    ) -> Partial:
        if not self._failures.has(part):
            with self._failures.contain(part, READING):
                return self._attend_part(layer, part, q_THD, asker)
        num_rows, num_heads, _ = q_THD.shape
        return Partial.empty(num_rows, num_heads, self._spec.layers[layer].value_dim, q_THD)

    def _attend_part(self, layer: int, part: SequencePart, q_THD: Tensor, asker: int) -> Partial:
        if not part.has_chunk:
            return self._attend_row(layer, part, q_THD)
        geometry = self._spec.layers[layer]
        history = self.history(layer, part)
        mask_TS = part.mask(history, geometry.window, asker, self._rank, q_THD.device)
        if mask_TS is None:
            partial = self._local.attend_pages(layer, part, q_THD)
            if partial is not None:
                return partial
            if self._is_read_in_pieces(layer, part):
                return self._attend_in_pieces(layer, part, q_THD)
        k_KSD, v_KSD = self.keys(layer, part)
        return self._local.attend(q_THD, k_KSD, v_KSD, geometry, mask_TS)

    def _is_read_in_pieces(self, layer: int, part: SequencePart) -> bool:
        """Whether a chunk's encoded history is so long that it is never restored as a whole."""
        is_alone = type(part) is SequencePart and part.is_local
        return is_alone and self.history(layer, part).ranks[self._rank].num_blocks > _PIECE_BLOCKS

    def _attend_in_pieces(self, layer: int, part: SequencePart, q_THD: Tensor) -> Partial:
        """Rows that see all of their history, over the exact keys and then some blocks at a time,
        so that only these are there at full size."""
        geometry = self._spec.layers[layer]
        history = self.history(layer, part)
        held = history.ranks[self._rank]
        exact = keys_and_values(self._store.gather(layer, history.runs).planes, geometry)
        partial = self._local.attend(q_THD, *exact, geometry)
        positions_BS = part.encoded_positions(held, ())
        skipped = held.num_skipped
        for ids_B, positions in zip(
            torch.split(history.encoded_ids_B, _PIECE_BLOCKS),
            torch.split(positions_BS, _PIECE_BLOCKS),
            strict=True,
        ):
            planes = self._store.read_encoded(layer, part.codec, ids_B)
            arrays = self._store.decode(layer, part.codec, planes, positions)
            piece = keys_and_values([x_KSD[:, skipped:] for x_KSD in arrays], geometry)
            partial = self._local.merge(partial, self._local.attend(q_THD, *piece, geometry))
            skipped = 0
        return partial

    def _attend_row(self, layer: int, part: SequencePart, q_1HD: Tensor) -> Partial:
        """The part's one row over its keys on this rank, which only one rank asks for."""
        geometry = self._spec.layers[layer]
        history = self.history(layer, part)
        partial = attend_pieces(q_1HD, self._exact_pieces(layer, part), geometry)
        held = history.ranks[self._rank]
        if not held.num_blocks:
            return partial
        positions_BS = part.encoded_positions(held, self._sent_positions(layer, part, q_1HD))
        keys = EncodedKeys(part.codec, history.encoded_ids_B, positions_BS, held.num_skipped)
        return merge(partial, attend_encoded(q_1HD, self._store, layer, keys, geometry))

    def history(self, layer: int, part: SequencePart) -> History:
        """What the part's rows read in the layer besides their own chunk."""
        geometry = self._spec.layers[layer]
        return part.history(self._spec.group_of(geometry), geometry.window)

    def _exact_pieces(self, layer: int, part: SequencePart) -> list[Piece]:
        """The exact keys of a row's history on this rank."""
        found = self._pieces.get(part)
        if found is None:
            found = self._store.pieces(layer, self.history(layer, part).runs)
            self._pieces[part] = found
        return found

    def keys(self, layer: int, part: SequencePart) -> Piece:
        """The keys of a chunk's history on this rank: several ranks may ask for them."""
        found = self._parts.get(part)
        if found is None:
            held = self.history(layer, part).ranks[self._rank]
            found = self.restore(layer, part, self.shard(layer, part), held)
            self._parts[part] = found
        return found

    def shard(self, layer: int, part: SequencePart) -> EncodedKV:
        """This rank's keys as they are kept and sent: the exact arrays, then encoded planes."""
        if not self._failures.has(part):
            with self._failures.contain(part, READING):
                return self._shard(layer, part)
        room = self.room(layer, part, self.history(layer, part).ranks[self._rank])
        return EncodedKV(tuple(plane.zero_() for plane in room.planes))

    def _shard(self, layer: int, part: SequencePart) -> EncodedKV:
        history = self.history(layer, part)
        exact = self._store.gather(layer, history.runs)
        if part.codec == EXACT:
            return exact
        encoded = self._store.read_encoded(layer, part.codec, history.encoded_ids_B)
        positions = self._sent_positions(layer, part, exact.planes[0])
        return EncodedKV((*exact.planes, *positions, *encoded))

    def _sent_positions(self, layer: int, part: SequencePart, like: Tensor) -> tuple[Tensor, ...]:
        return part.sent_positions(self._spec.kv_layer_of(layer), like)

    def room(self, layer: int, part: SequencePart, held: RankHistory) -> EncodedKV:
        """Buffers for the shard of another rank."""
        exact = self._store.empty(layer, held.num_exact(part.block_size))
        if part.codec == EXACT:
            return exact
        encoded = self._store.empty_encoded(layer, part.codec, held.num_blocks)
        positions = part.positions_room(held, exact.planes[0])
        return EncodedKV((*exact.planes, *positions, *encoded))

    def restore(self, layer: int, part: SequencePart, shard: EncodedKV, held: RankHistory) -> Piece:
        """k_KSD and v_KSD of a shard, in order of position."""
        if not self._failures.has(part):
            with self._failures.contain(part, READING):
                return self._restore(layer, part, shard, held)
        empty = self._store.empty(layer, held.num_tokens).planes
        return keys_and_values([x_KSD.zero_() for x_KSD in empty], self._spec.layers[layer])

    def _restore(
        self, layer: int, part: SequencePart, shard: EncodedKV, held: RankHistory
    ) -> Piece:
        geometry = self._spec.layers[layer]
        num_arrays = 1 if geometry.values_in_keys else 2
        arrays, encoded = shard.planes[:num_arrays], shard.planes[num_arrays:]
        if not held.num_blocks:
            return keys_and_values(arrays, geometry)
        num_sent = len(part.positions_room(held, arrays[0]))
        positions_BS = part.encoded_positions(held, encoded[:num_sent])
        decoded = self._store.decode(layer, part.codec, encoded[num_sent:], positions_BS)
        split, skipped = held.num_exact_before, held.num_skipped
        whole = [
            torch.cat([exact[:, :split], between[:, skipped:], exact[:, split:]], dim=1)
            for exact, between in zip(arrays, decoded, strict=True)
        ]
        return keys_and_values(whole, geometry)
