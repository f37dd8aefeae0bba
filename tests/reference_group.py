"""A ring group in threads with a small planner: what the engine does, in the plainest form.

It deals blocks as it is told, runs a prompt in chunks and decodes greedily, on any number of ranks.
"""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcluster.cache.store import KVStore
from kvcluster.cluster.runner import StepRunner
from kvcluster.engine.plan import (
    NewBlock,
    Release,
    SampledToken,
    SequenceStart,
    SequenceStep,
    StepPlan,
)
from kvcluster.model.loader import LoadedModel
from kvcluster.types import Policy, Route, SamplingParams
from tests.thread_ring import ThreadRing, run_ranks


@dataclass
class _Sequence:
    sequence: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    num_blocks: int = 0


class ReferenceGroup:
    """Ranks in threads. Block ids are dealt at random, so that nothing lies together by luck."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_ranks: int,
        block_size: int,
        num_blocks: int = 256,
        seed: int = 0,
    ) -> None:
        spec = model.spec
        self.spec = spec
        self.num_ranks = num_ranks
        self.block_size = block_size
        self._random = random.Random(seed)
        rings = ThreadRing.group(num_ranks)
        self._rings = rings
        self._free = [
            [self._random.sample(range(num_blocks), num_blocks) for _ in spec.windows]
            for _ in range(num_ranks)
        ]
        self._runners = [
            StepRunner(
                model=model,
                store=_poisoned(
                    KVStore(
                        spec,
                        blocks_per_group=[num_blocks] * len(spec.windows),
                        block_size=block_size,
                        like=next(model.module.parameters()),
                    ),
                    len(spec.layers),
                ),
                ring=ring,
                epoch=1,
                block_size=block_size,
            )
            for ring in rings
        ]
        self._step = 0
        self._sampled: tuple[SampledToken, ...] = ()
        self._sequences: dict[int, _Sequence] = {}
        self._started: list[SequenceStart] = []

    def start(self, sequence: int, prompt: Sequence[int]) -> None:
        self._started.append(SequenceStart(sequence, SamplingParams(), Policy()))
        self._sequences[sequence] = _Sequence(sequence, list(prompt), len(prompt))

    def output(self, sequence: int) -> list[int]:
        state = self._sequences[sequence]
        return state.token_ids[state.num_prompt_tokens :]

    def run(
        self, chunks: dict[int, int], *, owners: Sequence[int], route: Route = Route.PASS_KV
    ) -> None:
        """One step: `chunks` says how many tokens of each sequence it computes.

        A chunk's blocks go to `owners` in turn, so that any layout can be asked for.
        """
        steps = tuple(
            self._sequence_step(self._sequences[sequence], size, owners, route)
            for sequence, size in chunks.items()
        )
        self._step += 1
        plan = StepPlan(1, self._step, tuple(self._started), steps, tuple(self._releases(steps)))
        self._started = []

        def run_rank(rank: int) -> list[SampledToken]:
            torch.set_num_threads(1)
            return self._runners[rank].run(plan, self._sampled).sampled

        sampled = [token for tokens in run_ranks(self.num_ranks, run_rank) for token in tokens]
        assert self._rings[0].all_delivered()
        self._sampled = tuple(sampled)
        for token in sampled:
            state = self._sequences[token.sequence]
            assert token.position == len(state.token_ids)
            state.token_ids.append(token.token_id)

    def _sequence_step(
        self, state: _Sequence, size: int, owners: Sequence[int], route: Route
    ) -> SequenceStep:
        start, end = state.num_computed, state.num_computed + size
        appended = []
        while state.num_blocks * self.block_size < end:
            rank = owners[len(appended) % len(owners)]
            ids = tuple(free.pop() for free in self._free[rank])
            appended.append(NewBlock(rank, ids))
            state.num_blocks += 1
        is_decode = start >= state.num_prompt_tokens
        state.num_computed = end
        return SequenceStep(
            sequence=state.sequence,
            start=start,
            num_tokens=size,
            token_ids=b"" if is_decode else array("I", state.token_ids[start:end]).tobytes(),
            appended=tuple(appended),
            num_prompt_tokens=state.num_prompt_tokens,
            samples=end >= state.num_prompt_tokens,
            route=route,
        )

    def _releases(self, steps: Sequence[SequenceStep]) -> list[Release]:
        """As the engine does: what no later row can see is released, and later reads assert."""
        return [
            Release(step.sequence, group, max(0, step.start - window + 1) // self.block_size)
            for step in steps
            if step.start
            for group, window in enumerate(self.spec.windows)
            if window is not None
        ]


def _poisoned(store: KVStore, num_layers: int) -> KVStore:
    """Slots that were never written hold NaN: reading one shows in every later number."""
    for layer in range(num_layers):
        for plane in store.planes(layer):
            plane.fill_(float("nan"))
    return store
