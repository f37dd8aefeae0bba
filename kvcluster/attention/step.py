"""Attention of one step, layer by layer, as one rank runs it together with the others.

Three things happen per layer: K and V of this rank's rows are stored (unless the layer reads those
of an earlier one); every row meets the history of its sequence, wherever it lies; the rows of a
prefill chunk meet each other in full precision. The partials are merged.

Shape letters: T this rank's rows, S keys, H query heads, K KV heads, D head dimension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcluster.attention.chunk import ChunkAttention
from kvcluster.attention.encoding import BlockEncoding
from kvcluster.attention.failures import RAISED, Raised
from kvcluster.attention.implementation import Implementation, PlainAttention
from kvcluster.attention.own_keys import OwnKeys
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial, concatenate, merge, merge_sinks
from kvcluster.attention.ring import Message, Ring, gather, pass_kv
from kvcluster.attention.selected import SELECTING, SelectedAttention
from kvcluster.attention.selected_part import SelectedPart
from kvcluster.attention.survivor_choice import DROPPING, SurvivorChoice
from kvcluster.attention.survivors import SurvivorPart
from kvcluster.cache.store import KVStore, Places
from kvcluster.codec.base import EncodedKV
from kvcluster.types import Route


@dataclass(frozen=True)
class _Questions:
    """Whose queries go where in one KV group; the same for each of its layers."""

    asked: dict[int, list[SequencePart]]
    """By rank: the parts whose rows here read keys there."""
    asking: dict[int, list[SequencePart]]
    """By rank: the parts whose rows there read keys here."""


class StepAttention:
    """The parts of one step over one rank's store. Mutates the store: rows are written."""

    def __init__(
        self,
        store: KVStore,
        ring: Ring,
        parts: Sequence[SequencePart],
        selected: Sequence[SelectedPart] = (),
        survivors: Sequence[SurvivorPart] = (),
        implementation: Implementation | None = None,
        failures: Raised = RAISED,
    ) -> None:
        """`selected`: what is more to know of the parts whose policy selects; `survivors`: of those
        whose sequences keep tokens by score. `implementation`: of attention over keys that are
        here; None: that of torch. `failures`: what becomes of what fails."""
        self._spec = spec = store.spec
        self._store = store
        self._ring = ring
        self._parts = parts
        self._survivors = survivors
        self._local = implementation or PlainAttention()
        if self._local.rows is not None:
            self._local.rows.begin_step()
        self._failures = failures
        self._own = OwnKeys(store, ring.rank, self._local, failures)
        self._chunks = ChunkAttention(spec, store, ring, self._local, failures)
        self._selected = (
            SelectedAttention(spec, store, ring, selected, self._local.chosen, failures)
            if selected
            else None
        )
        self._choice = (
            SurvivorChoice(spec, store, ring, self._local, failures) if survivors else None
        )
        self._encoding = BlockEncoding(spec, store, ring.rank, parts, self._local, failures)
        self._groups = [spec.group_of(layer) for layer in spec.layers]
        self._places_by_group: dict[int, Places] = {}
        self._questions_by_group: dict[int, _Questions] = {}

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """out_THD of this rank's rows, in q's dtype. All ranks must be in the same layer: one
        without rows calls this with T = 0, because its keys are read all the same."""
        is_stored = self._spec.layers[layer].kv_layer is None
        if is_stored:
            self._keep(layer, q_THD, k_TKD, v_TKD)
        if self._selected is not None:
            self._selected.keep(layer)
        self._own.forget()
        partials = self._attend_history(layer, q_THD)
        if self._selected is not None:
            partials |= self._selected.attend(layer, q_THD)
            self._selected.forget(layer)
        for part in self._unselected(layer):
            if part.has_chunk:
                inside = self._chunks.attend(layer, part, q_THD, k_TKD, v_TKD)
                if inside is not None:
                    seen = [partials[part]] if part in partials else []
                    partials[part] = self._local.merge(*seen, inside)
        if self._choice is not None:
            self._choose_survivors(self._choice, layer, q_THD, sinks_H)
        if not partials:
            geometry = self._spec.layers[layer]
            return q_THD.new_empty((0, geometry.num_query_heads, geometry.value_dim))
        whole = concatenate([partials[part] for part in self._parts if part in partials])
        if sinks_H is not None:
            whole = merge_sinks(whole, sinks_H)
        return whole.out_THD.to(q_THD.dtype)

    def _keep(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write this rank's rows, and encode the blocks that they leave full."""
        if len(q_THD):
            places = self._row_places(self._groups[layer], k_TKD.device)
            self._store.write(layer, places, k_TKD, v_TKD)
        self._encoding.encode_full(layer, q_THD)

    def _choose_survivors(
        self, choice: SurvivorChoice, layer: int, q_THD: Tensor, sinks_H: Tensor | None
    ) -> None:
        """Leave survivors as the next layer that reads them finds them, or the next step."""
        is_last = self._spec.is_last_reader(layer)
        for kept in self._survivors_in(self._groups[layer]):
            ends = kept.ends_epoch and is_last
            if kept.is_observed or ends:
                self._observe(choice, layer, kept, q_THD, sinks_H)
            if ends and not self._failures.has(kept.part):
                with self._failures.contain(kept.part, SELECTING):
                    self._know_survivors(layer, kept)

    def _observe(
        self,
        choice: SurvivorChoice,
        layer: int,
        kept: SurvivorPart,
        q_THD: Tensor,
        sinks_H: Tensor | None,
    ) -> None:
        if self._ring.size > 1:
            # The ranks of a ring do this together: `SurvivorChoice` contains what each does alone.
            keys = self._own.keys(layer, kept.reader)
            choice.after_rows(layer, kept, keys, q_THD, sinks_H)
        elif not self._failures.has(kept.part):
            with self._failures.contain(kept.part, DROPPING):
                keys = self._own.keys(layer, kept.reader)
                choice.after_rows(layer, kept, keys, q_THD, sinks_H)

    def _know_survivors(self, layer: int, kept: SurvivorPart) -> None:
        """Tell a selection of the lists that an epoch has left."""
        if self._selected is None or not self._selected.knows_keys(kept.part):
            return
        k_KSD, _ = self._own.keys(layer, kept.next_reader)
        blocks_B = kept.blocks_after(self._ring.rank).to(k_KSD.device)
        source = self._spec.kv_layer_of(layer)
        self._selected.keep_survivors(source, kept.part, blocks_B, k_KSD)

    def encoding_errors(self) -> dict[SequencePart, tuple[float, float]]:
        """What encoding did to attention in all layers so far: see `EncodingErrors.sums`."""
        found = self._encoding.errors()
        of_survivors = {} if self._choice is None else self._choice.errors.sums()
        for part, (error, size) in of_survivors.items():
            other_error, other_size = found.get(part, (0.0, 0.0))
            found[part] = (error + other_error, size + other_size)
        return found

    def _unselected(self, layer: int) -> Sequence[SequencePart]:
        """The parts whose rows read all that they may in the layer."""
        selected = self._selected
        if selected is None:
            return self._parts
        return [part for part in self._parts if not selected.serves(layer, part)]

    def _row_places(self, group: int, device: torch.device) -> Places:
        places = self._places_by_group.get(group)
        if places is None:
            slots_T = torch.cat([part.slots(group) for part in self._parts])
            places = self._places_by_group[group] = self._store.places(slots_T.to(device))
        return places

    def _attend_history(self, layer: int, q_THD: Tensor) -> dict[SequencePart, Partial]:
        """Partials of this rank's rows over all history, by part."""
        group = self._groups[layer]
        partials = self._pass_queries(layer, q_THD)
        for part in self._readers(layer):
            if not part.travels_by_query:
                partial = self._pass_shards(layer, part, q_THD)
                if partial is not None:
                    partials[part] = partial
        for kept in self._survivors_in(group):
            if kept.reader in partials:
                survived = partials.pop(kept.reader)
                partials[kept.part] = merge(partials[kept.part], survived)
        return partials

    def _survivors_in(self, group: int) -> list[SurvivorPart]:
        return [kept for kept in self._survivors if kept.survivors.group == group]

    def _readers(self, layer: int) -> Sequence[SequencePart]:
        """The parts that read all positions that they may, then those that read survivors too."""
        unselected = self._unselected(layer)
        if not self._survivors:
            return unselected
        survivors = self._survivors_in(self._groups[layer])
        read = [kept.reader for kept in survivors if kept.num_before and kept.part in unselected]
        return [*unselected, *read]

    def _pass_queries(self, layer: int, q_THD: Tensor) -> dict[SequencePart, Partial]:
        """Queries travel: ask every rank that holds keys, answer every rank that asks.

        The own keys are read, and the own rows answered, while the queries are on their way.
        """
        ring = self._ring
        geometry = self._spec.layers[layer]
        heads, value_dim = geometry.num_query_heads, geometry.value_dim
        questions = self._questions(layer)
        queries = {
            rank: q_THD.new_empty((_num_rows(parts, rank), heads, geometry.key_dim))
            for rank, parts in questions.asking.items()
        }
        sends: list[Message] = [
            (rank, _rows_of(parts, q_THD)) for rank, parts in questions.asked.items()
        ]
        travelling = ring.exchange(sends, list(queries.items()))
        replies = {
            rank: Partial.room(_num_rows(parts, ring.rank), heads, value_dim, q_THD)
            for rank, parts in questions.asked.items()
        }
        for parts in questions.asking.values():
            for part in parts:
                self._own.prepare(layer, part)
        own = [
            part
            for part in self._readers(layer)
            if part.travels_by_query and part.num_rows[ring.rank]
        ]
        seen = self._own.attend(layer, own, [q_THD[part.rows] for part in own], ring.rank)
        found = {part: [partial] for part, partial in zip(own, seen, strict=True)}
        travelling.wait()
        answers = {
            rank: self._answer(layer, parts, queries[rank], rank)
            for rank, parts in questions.asking.items()
        }
        ring.exchange(_by_plane(answers), _by_plane(replies)).wait()
        for rank, parts in questions.asked.items():
            rows = [part.num_rows[ring.rank] for part in parts]
            for part, partial in zip(parts, _split(replies[rank], rows), strict=True):
                found[part].append(partial)
        return {part: self._local.merge(*partials) for part, partials in found.items()}

    def _questions(self, layer: int) -> _Questions:
        group, window = self._groups[layer], self._spec.layers[layer].window
        found = self._questions_by_group.get(group)
        if found is None:
            readers = self._readers(layer)

            def between(rows: int, keys: int) -> list[SequencePart]:
                return [
                    part
                    for part in readers
                    if part.travels_by_query
                    and part.num_rows[rows]
                    and part.history(group, window).ranks[keys].num_tokens
                ]

            here = self._ring.rank
            others = [rank for rank in range(self._ring.size) if rank != here]
            found = _Questions(
                asked={rank: parts for rank in others if (parts := between(here, rank))},
                asking={rank: parts for rank in others if (parts := between(rank, here))},
            )
            self._questions_by_group[group] = found
        return found

    def _answer(
        self, layer: int, parts: Sequence[SequencePart], q_THD: Tensor, asker: int
    ) -> Partial:
        """Another rank's rows over the keys here."""
        queries = torch.split(q_THD, [part.num_rows[asker] for part in parts])
        return concatenate(self._own.attend(layer, parts, queries, asker))

    def _pass_shards(self, layer: int, part: SequencePart, q_THD: Tensor) -> Partial | None:
        """Shards travel: this rank's rows over every rank's shard. None without rows."""
        geometry = self._spec.layers[layer]
        history = part.history(self._groups[layer], geometry.window)
        own = self._own.shard(layer, part)
        q_rows = q_THD[part.rows]
        partial = Partial.empty(
            q_rows.shape[0], geometry.num_query_heads, geometry.value_dim, q_THD
        )

        def visit(source: int, shard: EncodedKV) -> None:
            nonlocal partial
            if q_rows.shape[0] and history.ranks[source].num_tokens:
                k_KSD, v_KSD = self._own.restore(layer, part, shard, history.ranks[source])
                mask_TS = part.mask(history, geometry.window, self._ring.rank, source, q_THD.device)
                seen = self._local.attend(q_rows, k_KSD, v_KSD, geometry, mask_TS)
                partial = self._local.merge(partial, seen)

        def room(source: int) -> EncodedKV:
            return self._own.room(layer, part, history.ranks[source])

        travel = gather if part.route is Route.GATHER else pass_kv
        travel(own, room, visit, self._ring)
        return partial if q_rows.shape[0] else None


def _num_rows(parts: Sequence[SequencePart], rank: int) -> int:
    return sum(part.num_rows[rank] for part in parts)


def _rows_of(parts: Sequence[SequencePart], q_THD: Tensor) -> Tensor:
    """This rank's rows of the parts, in their order."""
    own = [q_THD[part.rows] for part in parts]
    return own[0] if len(own) == 1 else torch.cat(own)


def _by_plane(partials: Mapping[int, Partial]) -> list[Message]:
    return [(rank, plane) for rank, partial in partials.items() for plane in partial]


def _split(whole: Partial, rows: list[int]) -> list[Partial]:
    return [
        Partial(out_THD, lse_TH)
        for out_THD, lse_TH in zip(*(torch.split(plane, rows) for plane in whole), strict=True)
    ]
