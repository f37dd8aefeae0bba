"""Ranks in threads that do nothing but attend: one sequence over their stores, step by step."""

import copy
import random

import torch
from torch import Tensor

from kvcluster.attention.part import CacheRules, SequencePart
from kvcluster.attention.step import StepAttention
from kvcluster.cache.saved import SavedCache, StoredForm, join, read_held, stored_form, write_held
from kvcluster.cache.shard import SequenceMap
from kvcluster.cache.store import KVStore
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.types import EXACT, PAGE_BLOCKS, Route
from tests.scripted_model import ScriptedModel
from tests.thread_ring import ThreadRing, run_ranks

_NUM_BLOCKS = 128


class AttentionGroup:
    """Block ids are dealt at random; slots that were never written hold NaN."""

    def __init__(
        self,
        model: ScriptedModel,
        codecs: ModelCodecs,
        rules: CacheRules,
        *,
        num_ranks: int,
        block_size: int,
        seed: int = 0,
    ) -> None:
        self.rules = rules
        self.num_tokens = 0
        self.errors: list[tuple[float, float]] = []
        """Of the last step, by rank: its sums of `encoding_errors`."""
        self.stores = [
            KVStore(
                model.spec,
                blocks_per_group=[_NUM_BLOCKS] * len(model.spec.windows),
                block_size=block_size,
                like=torch.empty(0),
                codecs=codecs,
            )
            for _ in range(num_ranks)
        ]
        for store in self.stores:
            for layer in range(len(model.spec.layers)):
                for plane in store.planes(layer):
                    plane.fill_(float("nan"))
        self.table = SequenceMap(
            block_size=block_size, num_ranks=num_ranks, num_groups=len(model.spec.windows)
        )
        self._model = model
        self._codecs = codecs
        self._rings = ThreadRing.group(num_ranks)
        self._free: dict[tuple[int, int, str], list[int]] = {}
        self._random = random.Random(seed)

    @property
    def form(self) -> StoredForm:
        return stored_form(
            self._model.spec,
            self._codecs,
            self.rules.codec,
            block_size=self.table.block_size,
            exact_blocks=self.rules.exact_blocks,
        )

    def run(self, size: int) -> list[Tensor]:
        """Compute the next tokens; out_THD of each layer."""
        start, end = self.num_tokens, self.num_tokens + size
        while self.table.capacity_tokens < end:
            self._append(self.table.capacity_tokens // self.table.block_size)
        self._release(start)
        self.num_tokens = end

        def run_rank(rank: int) -> tuple[Tensor, list[Tensor], tuple[float, float]]:
            torch.set_num_threads(1)
            part = SequencePart(
                self.table,
                start=start,
                num_tokens=size,
                route=Route.PASS_KV,
                rank=rank,
                row_offset=0,
                rules=self.rules,
            )
            ring, store = self._rings[rank], self.stores[rank]
            attention = StepAttention(store, ring, [part])
            positions = part.positions(rank)
            out = [
                attention.attend(layer, *(x[positions] for x in qkv), None)
                for layer, qkv in enumerate(self._model.script)
            ]
            return positions, out, attention.encoding_errors().get(part, (0.0, 0.0))

        by_rank = run_ranks(len(self.stores), run_rank)
        self.errors = [errors for _, _, errors in by_rank]
        order = torch.cat([positions for positions, _, _ in by_rank]).argsort()
        layers = zip(*(layers for _, layers, _ in by_rank), strict=True)
        return [torch.cat(of_ranks)[order] for of_ranks in layers]

    def save(self) -> SavedCache:
        return join(
            [
                read_held(store, self.table, rank=rank, form=self.form, num_tokens=self.num_tokens)
                for rank, store in enumerate(self.stores)
            ]
        )

    def load(self, saved: SavedCache, *, places_of: "AttentionGroup | None" = None) -> None:
        """Take the sequence over, its blocks where another group has them or anywhere."""
        self.num_tokens = saved.header.num_tokens
        if places_of is None:
            for entry in range(-(-self.num_tokens // self.table.block_size)):
                self._append(entry)
            for group, held in enumerate(saved.header.groups):
                entries = {*held.exact, *held.encoded}
                gone = [entry for entry in range(max(entries)) if entry not in entries]
                if gone:
                    self.table.release(group, range(gone[0], gone[-1] + 1))
        else:
            self.table = copy.deepcopy(places_of.table)
            self._free = copy.deepcopy(places_of._free)
            self._random.setstate(places_of._random.getstate())
        for rank, store in enumerate(self.stores):
            write_held(store, self.table, rank=rank, saved=saved)

    def _append(self, entry: int) -> None:
        rank = self._random.randrange(len(self.stores))
        codec, groups = self.rules.codec, range(len(self._model.spec.windows))
        is_encoded = codec != EXACT and entry > 0
        self.table.append(
            rank,
            tuple(self._block(rank, group, EXACT) for group in groups),
            tuple(self._block(rank, group, codec) for group in groups) if is_encoded else (),
        )

    def _block(self, rank: int, group: int, codec: str) -> int:
        """Exact blocks are in the first half of the pages, encoded ones in the second."""
        half = _NUM_BLOCKS // PAGE_BLOCKS // 2
        if (rank, group, codec) not in self._free:
            per_page, first = PAGE_BLOCKS, 0
            if codec != EXACT:
                per_page, first = self.stores[rank].blocks_per_page(group, codec), half
            ids = range(first * per_page, (first + half) * per_page)
            self._free[rank, group, codec] = self._random.sample(ids, len(ids))
        return self._free[rank, group, codec].pop()

    def _release(self, start: int) -> None:
        size, recent = self.table.block_size, self.rules.recent_blocks
        for group, window in enumerate(self._model.spec.windows):
            if window is not None:
                below, after = max(0, start - window + 1) // size, 0
            elif recent is not None:
                below, after = max(1, start // size - recent + 1), 1
            else:
                continue
            self.table.release(group, range(after, max(after, below)))
