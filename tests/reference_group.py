"""A ring group in threads with a small planner: what the engine does, in the plainest form.

It deals blocks as it is told, runs a prompt in chunks and decodes greedily, on any number of ranks.
"""

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvcluster.attention.implementation import Implementation, implementation_for
from kvcluster.cache.store import KVStore
from kvcluster.cluster.runner import StepRunner
from kvcluster.cluster.running_step import StepBefore, StepOutcome
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.engine.plan import (
    EncodingError,
    NewBlock,
    Release,
    SampledToken,
    SequenceStart,
    SequenceStep,
    StepPlan,
)
from kvcluster.model.loader import LoadedModel
from kvcluster.retention.base import Budgeted
from kvcluster.retention.offered import budgeted, recent_blocks
from kvcluster.types import EXACT, NO_BLOCK, PAGE_BLOCKS, Policy, Route, SamplingParams
from tests.codec_models import plain_codecs
from tests.thread_ring import ThreadRing, run_ranks

EXACT_POLICY = Policy()


@dataclass
class _Sequence:
    sequence: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_given: int
    """Tokens that are known from the start: the prompt, and output that is computed again."""
    codec: str
    recent_blocks: int | None
    retention: Budgeted | None
    num_computed: int = 0
    blocks: list[NewBlock] = field(default_factory=list)
    num_survivor_blocks: int = 0


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
        codecs: ModelCodecs | None = None,
        exact_blocks: int = 0,
        implementation: Callable[[KVStore], Implementation] = implementation_for,
    ) -> None:
        spec = model.spec
        codecs = codecs or plain_codecs(spec)
        like = next(model.module.parameters()) if hasattr(model, "module") else torch.empty(0)
        self.spec = spec
        self.num_ranks = num_ranks
        self.block_size = block_size
        self._random = random.Random(seed)
        rings = ThreadRing.group(num_ranks)
        self._rings = rings
        # Exact blocks have the first half of the pages, encoded ones take the others.
        half = num_blocks // PAGE_BLOCKS // 2
        self._free = [
            [
                self._random.sample(range(half * PAGE_BLOCKS), half * PAGE_BLOCKS)
                for _ in spec.windows
            ]
            for _ in range(num_ranks)
        ]
        self._free_pages = [
            [self._random.sample(range(half, 2 * half), half) for _ in spec.windows]
            for _ in range(num_ranks)
        ]
        self._free_encoded: dict[tuple[int, int, str], list[int]] = {}
        self._stores = [
            _poisoned(
                KVStore(
                    spec,
                    blocks_per_group=[num_blocks] * len(spec.windows),
                    block_size=block_size,
                    like=like,
                    codecs=codecs,
                ),
                len(spec.layers),
            )
            for _ in rings
        ]
        self._runners = [
            StepRunner(
                model=model,
                store=store,
                ring=ring,
                epoch=1,
                exact_blocks=exact_blocks,
                implementation=implementation(store),
            )
            for ring, store in zip(rings, self._stores, strict=True)
        ]
        self._step = 0
        self.errors: list[EncodingError] = []
        """What all ranks measured in all steps."""
        self._sampled: tuple[SampledToken, ...] = ()
        self._sequences: dict[int, _Sequence] = {}
        self._started: list[SequenceStart] = []

    def start(
        self,
        sequence: int,
        prompt: Sequence[int],
        policy: Policy = EXACT_POLICY,
        *,
        output: Sequence[int] = (),
    ) -> None:
        """`output`: what the sequence had sampled when it was preempted."""
        self._started.append(SequenceStart(sequence, SamplingParams(), policy))
        self._sequences[sequence] = _Sequence(
            sequence,
            [*prompt, *output],
            len(prompt),
            len(prompt) + len(output),
            policy.storage,
            recent_blocks(policy.retention, self.block_size),
            None if None not in self.spec.windows else budgeted(policy.retention, self.block_size),
        )

    def output(self, sequence: int) -> list[int]:
        state = self._sequences[sequence]
        return state.token_ids[state.num_prompt_tokens :]

    def poison(self, sequence: int, blocks: Sequence[int]) -> None:
        """Overwrite exact blocks of a sequence: reading one shows in every later number."""
        for block in (self._sequences[sequence].blocks[index] for index in blocks):
            for layer, geometry in enumerate(self.spec.layers):
                page, place = divmod(block.block_ids[self.spec.group_of(geometry)], PAGE_BLOCKS)
                tokens = slice(place * self.block_size, (place + 1) * self.block_size)
                for plane in self._stores[block.rank].planes(layer):
                    plane[page, :, tokens] = float("nan")

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

        def run_rank(rank: int) -> StepOutcome:
            torch.set_num_threads(1)
            return self._runners[rank].run(plan, StepBefore(self._sampled))

        outcomes = run_ranks(self.num_ranks, run_rank)
        assert len({outcome.answering_ranks for outcome in outcomes}) == 1
        for rank, outcome in enumerate(outcomes):
            has_answer = bool(outcome.answer.sampled or outcome.answer.errors)
            assert rank in outcome.answering_ranks or not has_answer
            assert not outcome.answer.failed
        self.errors += [error for outcome in outcomes for error in outcome.answer.errors]
        sampled = [token for outcome in outcomes for token in outcome.answer.sampled]
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
        appended: list[NewBlock] = []
        while len(state.blocks) * self.block_size < end:
            rank = owners[len(appended) % len(owners)]
            appended.append(self._new_block(state, rank))
            state.blocks.append(appended[-1])
        survivors = self._new_survivor_blocks(state, end, owners)
        is_decode = start >= state.num_given
        state.num_computed = end
        return SequenceStep(
            sequence=state.sequence,
            start=start,
            num_tokens=size,
            token_ids=b"" if is_decode else array("I", state.token_ids[start:end]).tobytes(),
            appended=tuple(appended),
            num_prompt_tokens=state.num_prompt_tokens,
            samples=end >= state.num_given,
            route=route,
            survivors=survivors,
        )

    def _new_survivor_blocks(
        self, state: _Sequence, end: int, owners: Sequence[int]
    ) -> tuple[NewBlock, ...]:
        """What the survivors lack when the epoch ends there, dealt from the other end."""
        if state.retention is None or end % state.retention.epoch_tokens:
            return ()
        appended: list[NewBlock] = []
        group = self.spec.windows.index(None)
        while state.num_survivor_blocks * self.block_size < state.retention.counts(end).kept:
            rank = owners[-1 - len(appended) % len(owners)]
            is_encoded = state.codec != EXACT and state.num_survivor_blocks > 0
            exact_ids, encoded_ids = ([NO_BLOCK] * len(self.spec.windows) for _ in range(2))
            exact_ids[group] = self._free[rank][group].pop()
            if is_encoded:
                encoded_ids[group] = self._encoded_id(rank, group, state.codec)
            appended.append(
                NewBlock(rank, tuple(exact_ids), tuple(encoded_ids) if is_encoded else ())
            )
            state.num_survivor_blocks += 1
        return tuple(appended)

    def _new_block(self, state: _Sequence, rank: int) -> NewBlock:
        is_encoded = state.codec != EXACT and len(state.blocks) > 0
        groups = range(len(self.spec.windows)) if is_encoded else ()
        keeps_exact = None
        if state.retention is not None:
            keeps_exact = self.spec.windows.index(None)
        return NewBlock(
            rank,
            tuple(free.pop() for free in self._free[rank]),
            tuple(
                NO_BLOCK if group == keeps_exact else self._encoded_id(rank, group, state.codec)
                for group in groups
            ),
        )

    def _encoded_id(self, rank: int, group: int, codec: str) -> int:
        free = self._free_encoded.setdefault((rank, group, codec), [])
        if not free:
            page = self._free_pages[rank][group].pop()
            per_page = self._stores[rank].blocks_per_page(group, codec)
            free += self._random.sample(range(page * per_page, (page + 1) * per_page), per_page)
        return free.pop()

    def _releases(self, steps: Sequence[SequenceStep]) -> list[Release]:
        """As the engine does: what no later row can see is released, and later reads assert."""
        releases: list[Release] = []
        for step in steps:
            recent = self._sequences[step.sequence].recent_blocks
            retention = self._sequences[step.sequence].retention
            for group, window in enumerate(self.spec.windows):
                if window is not None:
                    below = max(0, step.start - window + 1) // self.block_size
                    releases.append(Release(step.sequence, group, below))
                elif retention is not None:
                    below = retention.epoch_start(step.start) // self.block_size
                    releases.append(Release(step.sequence, group, below))
                elif recent is not None:
                    below = step.start // self.block_size - recent + 1
                    releases.append(Release(step.sequence, group, max(1, below), after=1))
        return releases


def _poisoned(store: KVStore, num_layers: int) -> KVStore:
    """Slots that were never written hold NaN: reading one shows in every later number."""
    for layer in range(num_layers):
        for plane in store.planes(layer):
            plane.fill_(float("nan"))
    return store
