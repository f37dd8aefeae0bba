"""What one rank does in a step: its rows of every sequence, the model, the sampled tokens.

A plain class without Ray or processes: it is given a model, a store and a ring, so that a test can
build a group of them in threads.

Shape letters: T this rank's rows, R rows that sample, V vocabulary.
"""

from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcluster.attention.encoding import BlockEncoding, full_parts
from kvcluster.attention.failures import PartFailures
from kvcluster.attention.implementation import Implementation, implementation_for
from kvcluster.attention.part import SequencePart
from kvcluster.attention.ring import Ring
from kvcluster.attention.selected import keep_filled
from kvcluster.attention.selected_part import SelectedPart
from kvcluster.attention.selected_survivors import SelectedSurvivors
from kvcluster.attention.step import StepAttention
from kvcluster.attention.survivors import SequenceSurvivors, SurvivorPart
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.shard import SequenceMap
from kvcluster.cache.store import KVStore
from kvcluster.cache.zeroed_blocks import zero_blocks
from kvcluster.cluster.answers import (
    answering_ranks,
    encoding_errors,
    no_numbers,
    sampled_tokens,
    sequence_failures,
    unscored,
)
from kvcluster.cluster.recorded_steps import decode_graphs
from kvcluster.cluster.running_step import RunningStep, StepBefore, StepOutcome
from kvcluster.cluster.scoring import ScoredPiece, scored_pieces, scores
from kvcluster.cluster.step_rows import Rows, SequenceState
from kvcluster.cluster.thread_share import ThreadShare
from kvcluster.engine.plan import NewBlock, RankAnswer, SampledToken, SequenceStep, StepPlan
from kvcluster.errors import RankLost
from kvcluster.model.ahead_row import AheadRow
from kvcluster.model.loader import LoadedModel
from kvcluster.model.sampler import NO_TOKEN, SequenceSampling
from kvcluster.retention.registry import scored_retention
from kvcluster.types import Policy

if TYPE_CHECKING:
    from kvcluster.model.decode_graphs import DecodeGraphs, DecodeOutcome


class StepRunner:
    """One rank's side of the step protocol. Mutates the store; keeps the sequences' tables."""

    def __init__(
        self,
        *,
        model: LoadedModel,
        store: KVStore,
        ring: Ring,
        epoch: int,
        exact_blocks: int,
        share: ThreadShare | None = None,
        implementation: Implementation | None = None,
    ) -> None:
        """`implementation`: of attention over keys that are here; None: the fastest there is."""
        self._model = model
        self._spec = model.spec
        self._store = store
        self._ring = ring
        self._epoch = epoch
        self._block_size = store.block_size
        self._implementation = implementation or implementation_for(store)
        self._exact_blocks = exact_blocks
        self._graphs = decode_graphs(model, store, self._implementation)
        self._share = share
        self._next_step = 1
        self._sequences: dict[int, SequenceState] = {}
        self._running: deque[RunningStep] = deque()
        """Of a rank that is alone: steps whose tokens it has not taken in."""

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def run(self, plan: StepPlan, before: StepBefore) -> StepOutcome:
        """Run one step together with the other ranks.

        `before`: what all ranks found in the step before, since a decode row may move to another
        rank between steps. A sequence that failed has no rows in the steps that follow, and the
        answer says nothing of it; nor does it lack anything of the others.
        Raises: RankLost on a plan out of order, or when another rank is gone; and what is wrong
        with more than one sequence.
        """
        return self.begin(plan, before).outcome()

    def begin(self, plan: StepPlan, before: StepBefore) -> RunningStep:
        """As `run`, but a rank that is alone may not wait for the tokens of a step of decode: the
        next step can begin without them. What such a rank sampled it knows without being told."""
        if (plan.epoch, plan.step) != (self._epoch, self._next_step):
            raise RankLost(
                f"rank {self._ring.rank} expected step {self._next_step} of epoch {self._epoch}, "
                f"got step {plan.step} of epoch {plan.epoch}"
            )
        self._next_step += 1
        if self._ring.size > 1:
            self._remember(before)
        # One step may be under way, whose tokens are on the device.
        self._settle(leave=1)
        self._apply(plan)
        for zeroed in plan.zeroed:
            if zeroed.rank == self._ring.rank:
                zero_blocks(self._store, zeroed.group, zeroed.codec, zeroed.block_ids)
        rows = self._lay_out(plan)
        running = self._begin_ahead(rows) if rows else None
        if running is None:
            self._settle(leave=0)
            if any(row.state.has_failed for row in rows):
                rows = self._lay_out(plan)
            answer = self._compute(rows) if rows else RankAnswer()
            outcome = StepOutcome(answer, answering_ranks(rows, self._ring.size))
            running = RunningStep(lambda: outcome)
        if self._ring.size == 1:
            self._running.append(running)
        for sequence in plan.ended:
            self._sequences.pop(sequence, None)
        return running

    def _settle(self, *, leave: int) -> None:
        """Know the tokens of the steps that have begun, but for the latest ones."""
        while len(self._running) > leave or (self._running and not self._running[0].rows):
            answer = self._running.popleft().outcome().answer
            failed = tuple(failure.sequence for failure in answer.failed)
            self._remember(StepBefore(answer.sampled, failed))

    def _begin_ahead(self, rows: Sequence[Rows]) -> RunningStep | None:
        """Begin a step whose tokens the device chooses itself; None for any other step."""
        graphs = self._graphs
        if graphs is None or self._ring.size > 1 or not all(row.is_greedy for row in rows):
            return None
        parts, selected = [row.part for row in rows], _selected_of(rows)
        full = full_parts(parts, self._spec)
        is_due = any(row.fills_known_block for row in rows)
        if is_due or not graphs.serves(parts, selected):
            return None
        if not all(graphs.encodes(part) for part in full.values()):
            return None
        before = self._running[-1].rows if self._running else {}
        token_ids = [
            AheadRow(before[row.step.sequence])
            if not row.step.token_ids and row.step.sequence in before
            else int(self._token_ids(row)[0])
            for row in rows
        ]
        outcome, failures = graphs.forward(parts, token_ids, selected), _may_fail(rows)
        wait = graphs.send_tokens(outcome)
        wait_for_errors = graphs.encode(full, outcome, failures)
        answering = answering_ranks(rows, self._ring.size)

        def find() -> StepOutcome:
            found = list(zip(rows, wait(), strict=True))
            sampled = [
                SampledToken(row.step.sequence, row.step.start + row.step.num_tokens, token_id)
                for row, token_id in found
                if token_id != NO_TOKEN
            ]
            errors = encoding_errors(rows, wait_for_errors())
            failed = no_numbers(row for row, token_id in found if token_id == NO_TOKEN)
            failed += sequence_failures(rows, failures.found)
            return StepOutcome(RankAnswer(tuple(sampled), (), errors, failed), answering)

        return RunningStep(find, {row.step.sequence: place for place, row in enumerate(rows)})

    def _remember(self, before: StepBefore) -> None:
        for sequence in before.failed:
            if sequence in self._sequences:
                self._sequences[sequence].has_failed = True
        for token in before.sampled:
            state = self._sequences.get(token.sequence)
            if state is not None:
                state.last_token = token.token_id
                state.sampling.append([token.token_id])

    def _apply(self, plan: StepPlan) -> None:
        for start in plan.started:
            self._sequences[start.sequence] = SequenceState(
                self._empty_table(),
                self._no_survivors(start.policy),
                SequenceSampling(params=start.sampling, end_token_ids=self._spec.eos_token_ids),
                start.policy,
                exact=self._exact_region(start.policy),
            )
            _extend(self._sequences[start.sequence].table, start.adopted)
            self._sequences[start.sequence].sampling.append(array("I", start.adopted_ids))
        for release in plan.released:
            self._sequences[release.sequence].table.release(
                release.group, range(release.after, release.below)
            )
        for step in plan.sequences:
            state = self._sequences[step.sequence]
            _extend(state.table, step.appended)
            if step.survivors:
                assert state.survivors is not None, "survivors where tokens are kept by score"
                _extend(state.survivors.table, step.survivors)

    def _empty_table(self) -> SequenceMap:
        return SequenceMap(
            block_size=self._block_size,
            num_ranks=self._ring.size,
            num_groups=len(self._spec.windows),
        )

    def _exact_region(self, policy: Policy) -> ExactRegion:
        step = self._store.codecs.encoded_step(policy.storage, self._exact_blocks)
        return ExactRegion(self._exact_blocks, step)

    def _no_survivors(self, policy: Policy) -> SequenceSurvivors | None:
        """None where the policy keeps no tokens by score, or the model has windows throughout."""
        method = scored_retention(policy.retention, self._block_size)
        if method is None or None not in self._spec.windows:
            return None
        return SequenceSurvivors(method, self._spec.windows.index(None), self._empty_table())

    def _lay_out(self, plan: StepPlan) -> list[Rows]:
        rows = []
        offset = 0
        for step in plan.sequences:
            state = self._sequences[step.sequence]
            if state.has_failed:
                continue
            part = SequencePart(
                state.table,
                start=step.start,
                num_tokens=step.num_tokens,
                route=step.route,
                rules=state.rules,
                rank=self._ring.rank,
                row_offset=offset,
            )
            offset += part.num_rows[self._ring.rank]
            survivors = None if state.survivors is None else SurvivorPart(part, state.survivors)
            selected = self._selected(state, step, part, survivors)
            rows.append(Rows(state, step, part, survivors, selected))
        return rows

    def _selected(
        self,
        state: SequenceState,
        step: SequenceStep,
        part: SequencePart,
        survivors: SurvivorPart | None,
    ) -> SelectedPart | None:
        if state.selecting is None:
            return None
        device, num_prompt = self._model.device, step.num_prompt_tokens
        if survivors is not None:
            return SelectedSurvivors(survivors, state.selecting, num_prompt, device)
        return SelectedPart(part, state.table, state.selecting, num_prompt, device)

    def _compute(self, rows: Sequence[Rows]) -> RankAnswer:
        if self._share is not None:
            busy = [
                rank
                for rank in range(self._ring.size)
                if any(row.part.num_rows[rank] for row in rows)
            ]
            torch.set_num_threads(self._share.threads(self._ring.rank, busy))
        if self._graphs is not None and self._ring.size == 1 and all(row.is_single for row in rows):
            parts = [row.part for row in rows]
            if self._graphs.serves(parts, _selected_of(rows)):
                return self._decode(self._graphs, rows, parts)
        failures = _may_fail(rows)
        attention = StepAttention(
            self._store,
            self._ring,
            [row.part for row in rows],
            [row.selected for row in rows if row.selected is not None],
            [row.survivors for row in rows if row.survivors is not None],
            self._implementation,
            failures,
        )
        own_ids: list[Tensor] = []
        own_positions: list[Tensor] = []
        scored: list[ScoredPiece] = []
        for row in rows:
            token_ids = self._token_ids(row)
            positions = row.part.positions(self._ring.rank)
            own_positions.append(positions)
            own_ids.append(token_ids[positions - row.step.start])
            num_top = row.state.sampling.params.prompt_logprobs or 0
            scored += scored_pieces(row.step, row.part, token_ids, num_top)
        ids_T = torch.cat(own_ids)
        here = [row for row in rows if row.sampling_rank == self._ring.rank]
        # The last piece of a part holds its last row: the rows of a part lie together, ascending.
        logit_rows_R = torch.tensor([row.part.rows.stop - 1 for row in here], dtype=torch.long)
        if scored:
            logit_rows_R = torch.cat([logit_rows_R, *(piece.rows_R for piece in scored)])
        device = self._model.device
        forward = self._model.forward if self._graphs is None else self._graphs.compiled
        logits_RV = forward(
            ids_T.to(device),
            torch.cat(own_positions).to(device),
            logit_rows_R.to(device),
            attention,
        )
        sampled, failed = sampled_tokens(here, logits_RV[: len(here)])
        tokens = tuple(scores(scored, logits_RV[len(here) :])) if scored else ()
        return RankAnswer(
            sampled,
            tokens,
            encoding_errors(rows, attention.encoding_errors()),
            sequence_failures(rows, failures.found) + failed + unscored(rows, tokens),
        )

    @torch.inference_mode()
    def _decode(
        self, graphs: "DecodeGraphs", rows: Sequence[Rows], parts: Sequence[SequencePart]
    ) -> RankAnswer:
        """A step of single rows, all of them here."""
        selected = _selected_of(rows)
        token_ids = [int(self._token_ids(row)[0]) for row in rows]
        outcome = graphs.forward(parts, token_ids, selected)
        # No row looks at what is known of its own block, so that this may come afterwards.
        failures = _may_fail(rows)
        for layer in self._spec.storing_layers:
            keep_filled(self._spec, self._store, layer, selected, failures)
        # A row reads exact what becomes encoded because of it, so that this may come last.
        errors = self._encode(graphs, outcome, parts, failures)
        sampling = [index for index, row in enumerate(rows) if row.step.samples]
        logits_RV, likeliest_R = outcome.logits_RV, outcome.likeliest_R
        if len(sampling) < len(rows):
            logits_RV, likeliest_R = logits_RV[sampling], likeliest_R[sampling]
        here = [rows[index] for index in sampling]
        sampled, failed = sampled_tokens(here, logits_RV, likeliest_R)
        failed += sequence_failures(rows, failures.found)
        return RankAnswer(sampled, (), encoding_errors(rows, errors()), failed)

    def _encode(
        self,
        graphs: "DecodeGraphs",
        outcome: "DecodeOutcome",
        parts: Sequence[SequencePart],
        failures: PartFailures,
    ) -> Callable[[], Mapping[SequencePart, tuple[float, float]]]:
        """What single rows fill, after their step. What is returned waits for what that does."""
        full = full_parts(parts, self._spec)
        if all(graphs.encodes(part) for part in full.values()):
            return graphs.encode(full, outcome, failures)
        encoding = BlockEncoding(
            self._spec, self._store, self._ring.rank, parts, self._implementation, failures
        )
        for layer, q_RHD in outcome.queries.items():
            encoding.encode_full(layer, q_RHD)
        return encoding.errors

    def _token_ids(self, row: Rows) -> Tensor:
        """All token ids of the step's part, on every rank: penalties count each of them."""
        if not row.step.token_ids:
            if row.state.last_token is None:
                raise RankLost(f"sequence {row.step.sequence} decodes before anything was sampled")
            return torch.tensor([row.state.last_token])
        ids = array("I", row.step.token_ids)
        row.state.sampling.append(ids)
        return torch.tensor(ids, dtype=torch.long)


def _selected_of(rows: Sequence[Rows]) -> list[SelectedPart]:
    return [row.selected for row in rows if row.selected is not None]


def _extend(table: SequenceMap, blocks: Sequence[NewBlock]) -> None:
    for block in blocks:
        table.append(block.rank, block.block_ids, block.encoded_ids)


def _may_fail(rows: Sequence[Rows]) -> PartFailures:
    return PartFailures(row.part for row in rows if row.is_compressed)
