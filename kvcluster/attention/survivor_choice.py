"""Choosing the survivors of an epoch, and moving them to their place, layer by layer.

All ranks call it alike. Queries of a step are shown to all ranks, each of which adds what they give
to the tokens that it holds. When an epoch ends, each rank learns which tokens of the others stay,
so that all know every survivor's place and the size of every message; tokens then travel to the
rank that owns their place. A list is made anew in the blocks that it had, once all that was in
them has been read.

What a rank does alone to put survivors where they belong may fail for one part (`failures`). What
it does between the messages of a choice may not: the others wait for the next message of a rank
that does not know how large it is, so that this ends the ring. A rank that is alone waits for
nobody: there, all of it may fail (`StepAttention`).

Shape letters: T rows of a part, S candidates of this rank, C those of all ranks (places of the
lists before, then the epoch's positions), J places of the lists after, N places of this rank, K KV
heads, D head dimension, B blocks.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvcluster.attention.encoded import EncodedKeys
from kvcluster.attention.encoding_error import EncodingErrors
from kvcluster.attention.failures import RAISED, Raised
from kvcluster.attention.implementation import Implementation
from kvcluster.attention.ring import Message, Ring
from kvcluster.attention.ring_ranks import RingRanks
from kvcluster.attention.survivors import Marks, SurvivorPart
from kvcluster.cache.shard import SequenceMap
from kvcluster.cache.store import KVStore, Piece, keys_and_values
from kvcluster.codec.array import consecutive
from kvcluster.retention.attention_mass import UNIT, attention_mass
from kvcluster.retention.base import Heads
from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.ranks import ALONE, Ranks
from kvcluster.retention.scored import choose, observe
from kvcluster.types import ModelSpec

DROPPING: Final = "choosing what to keep"


class _Held(NamedTuple):
    """Tokens of one layer on this rank."""

    k_KSD: Tensor
    v_KSD: Tensor
    positions_KS: Tensor
    mass_KS: Tensor


@dataclass(frozen=True)
class _Layout:
    """Where an epoch's candidates are and where its survivors will be, the same for all layers.

    `place` counts the tokens of one rank.
    """

    owner_C: Tensor
    place_C: Tensor
    owner_J: Tensor
    place_J: Tensor


class SurvivorChoice:
    """Mutates the store and what is remembered of the sequences. One object a step."""

    def __init__(
        self,
        spec: ModelSpec,
        store: KVStore,
        ring: Ring,
        implementation: Implementation,
        failures: Raised = RAISED,
    ) -> None:
        self._local = implementation
        self._failures = failures
        self._spec = spec
        self._store = store
        self._ring = ring
        self._ranks: Ranks = ALONE if ring.size == 1 else RingRanks(ring)
        self._others = [rank for rank in range(ring.size) if rank != ring.rank]
        self._layouts: dict[SurvivorPart, _Layout] = {}
        self.errors = EncodingErrors(store, implementation)
        """What encoding survivors did to attention."""

    def after_rows(
        self,
        layer: int,
        part: SurvivorPart,
        survivors: Piece,
        q_THD: Tensor,
        sinks_H: Tensor | None,
    ) -> None:
        """Observe the part's queries, and end its epoch if it does: when the last layer has
        attended that reads these keys, since the others read the lists as they are.

        `survivors`: the lists on this rank as they are read. `q_THD`: all rows of this rank, whose
        keys are in the store.
        """
        method, geometry = part.survivors.method, self._spec.layers[layer]
        source = self._spec.kv_layer_of(layer)
        marks = part.survivors.marks_of(source, geometry.num_kv_heads, q_THD.device)
        held = self._held(layer, part, survivors, marks)
        if part.is_observed:
            rows_THD = self._gather_rows(part, q_THD)
            queries = Queries(rows_THD, part.part.start, geometry, sinks_H)
            candidates = _candidates(held)
            mass_of = partial(self._mass, part, marks.positions_KJ.shape[1])
            mass_KS = observe(method, candidates, queries, self._ranks, mass_of)
            held = held._replace(mass_KS=mass_KS)
        if part.ends_epoch and self._spec.is_last_reader(layer):
            kept_KS = choose(method, _candidates(held), part.part.end, self._ranks)
            moved = self._move(part, held, self._chosen(part, kept_KS))
            if not self._failures.has(part.part):
                with self._failures.contain(part.part, DROPPING):
                    self._put(layer, part, moved, marks.positions_KJ, q_THD)
            after = Marks(moved.positions_KS.int(), moved.mass_KS if method.carries_mass else None)
        else:
            after = marks._replace(mass_KS=held.mass_KS)
        part.survivors.marks[source] = after

    def _put(
        self,
        layer: int,
        part: SurvivorPart,
        moved: _Held,
        positions_before_KN: Tensor,
        q_THD: Tensor,
    ) -> None:
        """Write this rank's part of the lists, and measure what encoding does to it."""
        source, geometry = self._spec.kv_layer_of(layer), self._spec.layers[layer]
        written = self._write(source, part, moved, positions_before_KN)
        if written is not None and part.part.num_rows[self._ring.rank]:
            last_1HD = q_THD[part.part.rows][-1:]
            self.errors.measure(layer, part.part, last_1HD, *written, geometry, are_survivors=True)

    def _mass(
        self,
        part: SurvivorPart,
        num_before: int,
        candidates: Candidates,
        queries: Queries,
        ranks: Ranks,
    ) -> Tensor:
        """`attention_mass`; of a rank that holds all tokens, as it is offered. Of its candidates
        `num_before` are survivors of earlier epochs, and the others follow one another."""
        if ranks is ALONE and queries.sinks_H is None:
            first = num_before + queries.first - part.epoch_start
            shares_KS = self._local.attention_sums(
                queries.q_THD, candidates.k_KSD, queries.layer, first
            )
            if shares_KS is not None:
                return (shares_KS.double() / UNIT).round().long()
        return attention_mass(candidates, queries, ranks)

    def _held(self, layer: int, part: SurvivorPart, survivors: Piece, marks: Marks) -> _Held:
        """The survivors of this rank, then its tokens of the epoch."""
        rank, table, end = self._ring.rank, part.part.table, part.part.end
        runs = table.runs(rank, part.survivors.group, part.epoch_start, end)
        epoch = keys_and_values(self._store.gather(layer, runs).planes, self._spec.layers[layer])
        k_KSD, v_KSD = (torch.cat(planes, dim=1) for planes in zip(survivors, epoch, strict=True))
        own_S = torch.from_numpy(table.positions(rank, part.epoch_start, end)).to(k_KSD.device)
        positions_KS = torch.cat((marks.positions_KJ, own_S.expand(len(k_KSD), -1)), dim=1)
        mass_KS = torch.zeros_like(positions_KS)
        if marks.mass_KS is not None:
            mass_KS[:, : marks.mass_KS.shape[1]] = marks.mass_KS
        return _Held(k_KSD, v_KSD, positions_KS, mass_KS)

    def _gather_rows(self, part: SurvivorPart, q_THD: Tensor) -> Tensor:
        """The queries of all ranks, in order of position."""
        rows, own = part.part, q_THD[part.part.rows].contiguous()
        received = {
            rank: own.new_empty((rows.num_rows[rank], *own.shape[1:])) for rank in self._others
        }
        self._exchange([(rank, own) for rank in self._others], list(received.items()))
        received[self._ring.rank] = own
        taken = [0] * self._ring.size
        pieces = []
        for piece in rows.pieces:
            first = taken[piece.rank]
            last = taken[piece.rank] = first + piece.end - piece.start
            pieces.append(received[piece.rank][first:last])
        return torch.cat(pieces)

    def _chosen(self, part: SurvivorPart, kept_KS: Tensor) -> Tensor:
        """chosen_KJ: which candidate takes each place, of all ranks, told to all ranks."""
        owner_C = self._layout(part, kept_KS.device).owner_C
        own = kept_KS.byte().contiguous()
        received = {
            rank: own.new_empty((len(own), int((owner_C == rank).sum()))) for rank in self._others
        }
        self._exchange([(rank, own) for rank in self._others], list(received.items()))
        received[self._ring.rank] = own
        kept_KC = own.new_empty((len(own), len(owner_C)))
        for rank, kept in received.items():
            kept_KC[:, owner_C == rank] = kept
        return kept_KC.nonzero()[:, 1].reshape(len(own), -1)

    def _layout(self, part: SurvivorPart, device: torch.device) -> _Layout:
        found = self._layouts.get(part)
        if found is None:
            lists, positions = part.survivors.table, part.part.table
            owners = (
                _owners(lists, 0, part.num_before),
                _owners(positions, part.epoch_start, part.part.end),
            )
            owner_C, owner_J = torch.cat(owners), _owners(lists, 0, part.num_after)
            places = (_places(owner, self._ring.size) for owner in (owner_C, owner_J))
            place_C, place_J = places
            found = _Layout(*(x.to(device) for x in (owner_C, place_C, owner_J, place_J)))
            self._layouts[part] = found
        return found

    def _move(self, part: SurvivorPart, held: _Held, chosen_KJ: Tensor) -> _Held:
        """The survivors whose place is on this rank, in order of place. Blocks until all of this
        rank's have gone where they belong."""
        layout, here = self._layout(part, chosen_KJ.device), self._ring.rank
        from_KJ, to_KJ = layout.owner_C[chosen_KJ], layout.owner_J.expand_as(chosen_KJ)
        place_KJ = layout.place_C[chosen_KJ]
        sends: list[Message] = []
        for rank in self._others:
            heads, places = ((from_KJ == here) & (to_KJ == rank)).nonzero(as_tuple=True)
            sends += [(rank, x[heads, place_KJ[heads, places]]) for x in held]
        num_heads, num_own = len(chosen_KJ), int((layout.owner_J == here).sum())
        moved = _Held(*(x.new_empty((num_heads, num_own, *x.shape[2:])) for x in held))
        arriving = {}
        for rank in self._others:
            heads, places = ((from_KJ == rank) & (to_KJ == here)).nonzero(as_tuple=True)
            room = [x.new_empty((len(heads), *x.shape[2:])) for x in held]
            arriving[rank] = (heads, layout.place_J[places], room)
        self._exchange(sends, [(rank, x) for rank, (_, _, room) in arriving.items() for x in room])
        heads, places = ((from_KJ == here) & (to_KJ == here)).nonzero(as_tuple=True)
        stays = [x[heads, place_KJ[heads, places]] for x in held]
        arriving[here] = (heads, layout.place_J[places], stays)
        for heads, own_places, rows in arriving.values():
            for plane, x in zip(moved, rows, strict=True):
                plane[heads, own_places] = x
        return moved

    def _write(
        self, layer: int, part: SurvivorPart, moved: _Held, positions_before_KN: Tensor
    ) -> tuple[Piece, EncodedKeys] | None:
        """Put this rank's part of the lists where it belongs. What of it was encoded, as it was
        and as it is kept: nothing may have changed. None: no block here is encoded."""
        lists, codec, here = part.survivors.table, part.part.codec, self._ring.rank
        size, num_after, group = lists.block_size, part.num_after, part.survivors.group
        encoded = part.encoded_after
        spans = [range(num_after)]
        if encoded:
            spans = [range(size), range(encoded.stop, num_after)]
        runs = [run for span in spans for run in lists.runs(here, group, span.start, span.stop)]
        if runs:
            slots_T = torch.cat([torch.arange(run.start, run.stop) for run in runs])
            places_T = torch.cat([_own_places(lists, here, span) for span in spans])
            kv = (x[:, places_T].transpose(0, 1) for x in (moved.k_KSD, moved.v_KSD))
            places = self._store.places(slots_T.to(moved.k_KSD.device))
            self._store.write(layer, places, *kv)
        own = _own_places(lists, here, encoded)
        if not len(own):
            return None
        ids_B = torch.from_numpy(lists.encoded_ids(here, group, encoded.start, encoded.stop))
        blocks = slice(int(own[0]), int(own[-1]) + 1)
        filled = _own_places(lists, here, range(size, part.num_before // size * size))
        same_BK = _same(
            positions_before_KN[:, blocks][:, : len(filled)],
            moved.positions_KS[:, blocks],
            size,
        )
        positions_BS = moved.positions_KS[0, blocks].reshape(-1, size)
        if part.survivors.method.heads is Heads.OWN:
            # No position is common to all heads: the place stands for it.
            starts_B = torch.from_numpy(lists.block_starts(here, encoded.start, encoded.stop))
            positions_BS = consecutive(starts_B.to(positions_BS.device), size)
        changed_B = ~same_BK.all(dim=1)
        kv_BKSD = Piece(
            *(_blocks(x[:, blocks], size)[changed_B] for x in (moved.k_KSD, moved.v_KSD))
        )
        keys = EncodedKeys(codec, ids_B[changed_B.cpu()], positions_BS[changed_B], 0)
        self._store.encode(
            layer, codec, keys.ids_B, kv_BKSD, keys.positions_BS, same_BK=same_BK[changed_B]
        )
        return Piece(*map(_in_line, kv_BKSD)), keys

    def _exchange(self, sends: list[Message], receives: list[Message]) -> None:
        self._ring.exchange(sends, receives).wait()


def _candidates(held: _Held) -> Candidates:
    return Candidates(held.positions_KS, held.k_KSD, held.mass_KS)


def _owners(table: SequenceMap, start: int, end: int) -> Tensor:
    """The rank of each entry's token in [start, end)."""
    owners = [torch.full((p.end - p.start,), p.rank) for p in table.pieces(start, end)]
    return torch.cat(owners) if owners else torch.empty(0, dtype=torch.int64)


def _places(owner: Tensor, num_ranks: int) -> Tensor:
    """Which of its rank's tokens each token is."""
    place = torch.empty_like(owner)
    for rank in range(num_ranks):
        is_own = owner == rank
        place[is_own] = torch.arange(int(is_own.sum()))
    return place


def _own_places(table: SequenceMap, rank: int, span: range) -> Tensor:
    """Which of the rank's places those of the span are."""
    first = table.num_tokens(rank, 0, span.start)
    return torch.arange(first, first + table.num_tokens(rank, span.start, span.stop))


def _blocks(x_KND: Tensor, block_size: int) -> Tensor:
    """x_BKSD of whole blocks."""
    num_heads, _, dim = x_KND.shape
    return x_KND.reshape(num_heads, -1, block_size, dim).transpose(0, 1)


def _in_line(x_BKSD: Tensor) -> Tensor:
    """x_KND of whole blocks: the other way round."""
    return x_BKSD.transpose(0, 1).flatten(1, 2)


def _same(before_KN: Tensor, after_KN: Tensor, block_size: int) -> Tensor:
    """same_BK: where a block was whole before, with the same tokens of the head."""
    num_before = before_KN.shape[1]
    is_equal_KN = torch.zeros_like(after_KN, dtype=torch.bool)
    is_equal_KN[:, :num_before] = before_KN == after_KN[:, :num_before]
    return is_equal_KN.reshape(len(after_KN), -1, block_size).all(dim=2).T
