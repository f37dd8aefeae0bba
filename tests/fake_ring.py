"""A ring group without a model: it keeps what workers keep, distrusts every plan, and 'samples' a
hash of all tokens that a sequence holds. So equal tokens mean that equal tokens were computed.
"""

import hashlib
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from kvcluster.cache.exact_region import ExactRegion
from kvcluster.engine.plan import (
    NewBlock,
    Release,
    SampledToken,
    ScoredTokens,
    SequenceStart,
    SequenceStep,
    StepPlan,
    StepResult,
)
from kvcluster.engine.survivor_table import group_by_score
from kvcluster.retention.base import Budgeted
from kvcluster.retention.offered import budgeted, recent_blocks
from kvcluster.types import EXACT, NO_BLOCK, PAGE_BLOCKS, ModelSpec, Policy, SamplingParams


def next_token(tokens: list[int], sampling: SamplingParams, vocab_size: int) -> int:
    """What the fake model says after `tokens`: a function of them and the seed alone."""
    digest = hashlib.blake2b(array("I", tokens).tobytes(), digest_size=8)
    digest.update(sampling.seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") % vocab_size


def expected_output(
    prompt: list[int], sampling: SamplingParams, *, max_output_tokens: int, spec: ModelSpec
) -> list[int]:
    """The output of a request that runs alone."""
    tokens = list(prompt)
    ends = {*spec.eos_token_ids, *sampling.stop_token_ids}
    while len(tokens) - len(prompt) < max_output_tokens:
        tokens.append(next_token(tokens, sampling, spec.vocab_size))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


@dataclass(frozen=True)
class Held:
    """A block that a sequence holds on a rank."""

    rank: int
    group: int
    codec: str
    block_id: int


@dataclass
class FakeSequence:
    sampling: SamplingParams
    policy: Policy
    tokens: list[int] = field(default_factory=list)
    """Tokens whose K and V are stored."""
    sampled: int | None = None
    owners: list[int] = field(default_factory=list)
    entries: list[list[set[Held]]] = field(default_factory=list)
    """`[entry][group]`: what the entry holds, exact or encoded or both for a while."""
    released_below: list[int] = field(default_factory=list)
    survivors: list[list[set[Held]]] = field(default_factory=list)
    """The same of the survivors' table, which holds something in one group only."""


class FakeRing:
    """Runs plans like a ring group's ranks would, and asserts what they rely on."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        block_size: int,
        pool_sizes: list[tuple[int, ...]],
        encoded_per_page: Mapping[str, Sequence[int]],
        exact_recent: int = 0,
        encoded_step: Callable[[str], int | None] = lambda _codec: None,
        epoch: int = 1,
    ) -> None:
        self.spec = spec
        self.epoch = epoch
        self.num_steps = 0
        self.num_empty_steps = 0
        self.sequences: dict[int, FakeSequence] = {}
        self.block_size = block_size
        self.pool_sizes = pool_sizes
        self.encoded_per_page = encoded_per_page
        self.exact_recent = exact_recent
        self.encoded_step = encoded_step
        self.zeroed: set[Held] = set()
        self._known: set[int] = set()
        self._users: dict[Held, set[int]] = {}
        self._tokens: dict[Held, tuple[list[int], int]] = {}
        """A sequence's tokens, which only grow, and how many of them end with the block."""
        self._contents: dict[tuple[int, int, int], list[str]] = {}
        """(rank, group, page) -> the codec of each block in it."""

    @property
    def num_used(self) -> int:
        return len(self._users)

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.epoch == self.epoch
        assert plan.step == self.num_steps + 1
        self.num_steps += 1
        self.num_empty_steps += not plan.sequences
        for zeroed in plan.zeroed:
            for block_id in zeroed.block_ids:
                held = Held(zeroed.rank, zeroed.group, zeroed.codec, block_id)
                self.zeroed.add(held)
                self._tokens.pop(held, None)
        self._begin(plan)
        for step in plan.sequences:
            sequence = self.sequences[step.sequence]
            for block in step.appended:
                sequence.owners.append(block.rank)
                self._append(step, block, sequence.entries, self._kept_exact(sequence))
            for block in step.survivors:
                kept = {group_by_score(self.spec.windows)}
                others = set(range(len(self.spec.windows))) - kept
                self._append(step, block, sequence.survivors, others, empty=others)
        assert len({step.sequence for step in plan.sequences}) == len(plan.sequences)
        sampled = [token for step in plan.sequences for token in self._run(step)]
        scored = [tokens for step in plan.sequences for tokens in self._score(step)]
        for step in plan.sequences:
            self._encode(step)
        for number in plan.ended:
            ended = self.sequences.pop(number)
            for groups in (*ended.entries, *ended.survivors):
                for holding in groups:
                    self._free(number, holding)
        return StepResult(plan.epoch, plan.step, tuple(sampled), tuple(scored))

    def tokens_on_ranks(self) -> set[int]:
        """Every token that some block still holds, whether anybody uses it or not."""
        size = self.block_size
        return {token for known, end in self._tokens.values() for token in known[end - size : end]}

    def _begin(self, plan: StepPlan) -> None:
        for start in plan.started:
            assert start.sequence not in self._known, "a sequence number is never used twice"
            self._known.add(start.sequence)
            self.sequences[start.sequence] = FakeSequence(
                start.sampling, start.policy, released_below=[0] * len(self.spec.windows)
            )
        # What others have left may be taken by those who begin.
        begun = {start.sequence for start in plan.started}
        for release in plan.released:
            if release.sequence not in begun:
                self._release(release)
        for start in plan.started:
            self._adopt(start)
        for release in plan.released:
            if release.sequence in begun:
                self._release(release)

    def _retention(self, sequence: FakeSequence) -> Budgeted | None:
        """How the sequence keeps tokens by score; None: it does not."""
        if group_by_score(self.spec.windows) is None:
            return None
        return budgeted(sequence.policy.retention, self.block_size)

    def _exact_region(self, sequence: FakeSequence) -> ExactRegion:
        return ExactRegion(self.exact_recent, self.encoded_step(sequence.policy.storage))

    def _kept_exact(self, sequence: FakeSequence) -> set[int]:
        """Groups in which positions are never encoded."""
        group = group_by_score(self.spec.windows)
        return set() if self._retention(sequence) is None or group is None else {group}

    def _append(
        self,
        step: SequenceStep,
        block: NewBlock,
        entries: list[list[set[Held]]],
        kept_exact: Collection[int],
        empty: Collection[int] = (),
    ) -> None:
        codec = self.sequences[step.sequence].policy.storage
        num_groups = len(self.spec.windows)
        is_encoded = codec != EXACT and len(entries) > 0
        assert len(block.encoded_ids) == num_groups * is_encoded
        assert len(block.block_ids) == num_groups
        holding: list[set[Held]] = [set() for _ in range(num_groups)]
        for kind, ids, without in (
            (EXACT, block.block_ids, empty),
            (codec, block.encoded_ids, kept_exact),
        ):
            for group, block_id in enumerate(ids):
                assert (block_id == NO_BLOCK) == (group in without)
                if block_id != NO_BLOCK:
                    held = Held(block.rank, group, kind, block_id)
                    self._take(step.sequence, held)
                    holding[group].add(held)
        entries.append(holding)

    def _adopt(self, start: SequenceStart) -> None:
        """A sequence begins with blocks that others wrote: those that one of its length holds, with
        the same tokens before them. Blocks that were never written are its own."""
        sequence, num_blocks = self.sequences[start.sequence], len(start.adopted)
        region, is_exact = self._exact_region(sequence), start.policy.storage == EXACT
        first_exact = 0 if is_exact else region.first_block(num_blocks)
        assert not start.adopted or not self._retention(sequence)
        read = [
            set(self._read_from(sequence, group, num_blocks))
            for group in range(len(self.spec.windows))
        ]
        for index, block in enumerate(start.adopted):
            holding: list[set[Held]] = [set() for _ in read]
            end = (index + 1) * self.block_size
            for group, entries in enumerate(read):
                encoded_id = block.encoded_ids[group] if block.encoded_ids else NO_BLOCK
                shared = Held(block.rank, group, EXACT, block.block_ids[group])
                if 0 < index < first_exact:
                    assert shared.block_id == NO_BLOCK
                    shared = Held(block.rank, group, start.policy.storage, encoded_id)
                elif encoded_id != NO_BLOCK:
                    own = Held(block.rank, group, start.policy.storage, encoded_id)
                    self._take(start.sequence, own)
                    holding[group].add(own)
                assert (index in entries) == (shared.block_id != NO_BLOCK)
                if shared.block_id != NO_BLOCK:
                    known, known_end = self._tokens[shared]
                    assert known_end == end
                    num_checked = len(sequence.tokens) if index == num_blocks - 1 else 0
                    assert known[:num_checked] == sequence.tokens[:num_checked]
                    sequence.tokens += known[len(sequence.tokens) : end]
                    own_start = index * self.block_size
                    assert known[own_start:end] == sequence.tokens[own_start:end]
                    self._take(start.sequence, shared, is_shared=True)
                    holding[group].add(shared)
            sequence.owners.append(block.rank)
            sequence.entries.append(holding)
        assert len(sequence.tokens) == num_blocks * self.block_size
        if start.sampling.counts_tokens:
            ids = array("I")
            ids.frombytes(start.adopted_ids)
            assert list(ids) == sequence.tokens

    def _read_from(self, sequence: FakeSequence, group: int, num_blocks: int) -> list[int]:
        """Entries that the first row after so many blocks reads."""
        sequence.entries = [[set()]] * num_blocks
        read = self._read_entries(sequence, group, num_blocks * self.block_size)
        sequence.entries = []
        return [entry for entry in read if entry < num_blocks]

    def _write(self, sequence: FakeSequence, first: int) -> None:
        """Remember what the blocks that are full now hold."""
        for entry in range(first // self.block_size, len(sequence.tokens) // self.block_size):
            known = (sequence.tokens, (entry + 1) * self.block_size)
            for holding in sequence.entries[entry]:
                for held in holding:
                    assert len(self._users[held]) == 1, "a block that others read is not written"
                    if held.codec == EXACT:
                        self._tokens[held] = known

    def _take(self, number: int, held: Held, *, is_shared: bool = False) -> None:
        assert is_shared or held not in self._users, "a block has one user that writes it"
        if not is_shared:
            self._tokens.pop(held, None)
        if held in self._users:
            self._users[held].add(number)
            return
        per_page = PAGE_BLOCKS
        if held.codec != EXACT:
            per_page = self.encoded_per_page[held.codec][held.group]
        page = held.block_id // per_page
        num_blocks = self.pool_sizes[held.rank][held.group]
        # The last page may be too short for anything but exact blocks.
        assert (page + 1) * PAGE_BLOCKS <= num_blocks or held.codec == EXACT
        assert held.codec != EXACT or 0 <= held.block_id < num_blocks
        contents = self._contents.setdefault((held.rank, held.group, page), [])
        assert set(contents) <= {held.codec}, "a page holds one kind of blocks"
        contents.append(held.codec)
        self._users[held] = {number}

    def _free(self, number: int, holding: set[Held]) -> None:
        for held in holding:
            self._users[held].remove(number)
            if self._users[held]:
                continue
            del self._users[held]
            per_page = PAGE_BLOCKS
            if held.codec != EXACT:
                per_page = self.encoded_per_page[held.codec][held.group]
            page = (held.rank, held.group, held.block_id // per_page)
            self._contents[page].remove(held.codec)
        holding.clear()

    def _run(self, step: SequenceStep) -> list[SampledToken]:
        sequence = self.sequences[step.sequence]
        end = step.start + step.num_tokens
        assert step.num_tokens > 0
        assert step.start == len(sequence.tokens), "positions are computed once, in order"
        blocks = -(-end // self.block_size)
        assert len(sequence.owners) == blocks, "a table covers what is computed and no more"
        assert step.samples or end % self.block_size == 0, "chunks end with a block or the tokens"
        self._check_epoch(sequence, step)
        region = self._exact_region(sequence)
        assert end == region.chunk_end(step.start, end, self.block_size), "a chunk is of one step"
        is_decode = not step.token_ids
        assert is_decode or step.start % self.block_size == 0, "chunks begin with blocks"
        for group in range(len(self.spec.windows)):
            read = self._read_entries(sequence, group, step.start)
            assert all(sequence.entries[entry][group] for entry in read), "a block that is read"
        if step.token_ids:
            ids = array("I")
            ids.frombytes(step.token_ids)
            assert len(ids) == step.num_tokens
            assert sequence.sampled is None, "ranks know what they sampled"
            sequence.tokens += ids
        else:
            assert step.num_tokens == 1
            assert sequence.sampled is not None
            sequence.tokens.append(sequence.sampled)
        self._write(sequence, step.start)
        if not step.samples:
            return []
        assert 0 < step.num_prompt_tokens <= end
        sequence.sampled = next_token(sequence.tokens, sequence.sampling, self.spec.vocab_size)
        return [SampledToken(step.sequence, end, sequence.sampled)]

    def _score(self, step: SequenceStep) -> list[ScoredTokens]:
        """A prompt token's log probability, in this ring, is minus its id."""
        scoring, sequence = step.scoring, self.sequences[step.sequence]
        if scoring is None:
            return []
        assert step.start < scoring.first < scoring.below <= step.start + step.num_tokens + 1
        known = [*sequence.tokens, scoring.next_id]
        logprobs = tuple(-float(token) for token in known[scoring.first : scoring.below])
        # In two pieces, as from two ranks.
        middle = len(logprobs) // 2
        pieces = [(scoring.first, logprobs[:middle]), (scoring.first + middle, logprobs[middle:])]
        return [ScoredTokens(step.sequence, first, part) for first, part in pieces if part]

    def _check_epoch(self, sequence: FakeSequence, step: SequenceStep) -> None:
        """A chunk stays in its epoch, and survivors have just the blocks that they need."""
        retention, end = self._retention(sequence), step.start + step.num_tokens
        if retention is None:
            assert not step.survivors
            return
        assert retention.epoch_start(step.start) == retention.epoch_start(end - 1)
        held_from = retention.epoch_start(end)
        assert not step.survivors or held_from == end, "survivors are chosen when an epoch ends"
        needed = -(-retention.counts(held_from).kept // self.block_size)
        assert len(sequence.survivors) == needed
        group = group_by_score(self.spec.windows)
        assert group is not None
        assert all(holding[group] for holding in sequence.survivors), "survivors are read"

    def _read_entries(self, sequence: FakeSequence, group: int, start: int) -> list[int]:
        """Entries that the rows from `start` on read or write."""
        window, first = self.spec.windows[group], 0
        recent = recent_blocks(sequence.policy.retention, self.block_size)
        if window is not None:
            first = max(0, start - window + 1) // self.block_size
        elif (retention := self._retention(sequence)) is not None:
            first = retention.epoch_start(start) // self.block_size
        elif recent is not None:
            first = max(1, start // self.block_size - recent + 1)
            return [0, *range(first, len(sequence.entries))]
        return list(range(first, len(sequence.entries)))

    def _encode(self, step: SequenceStep) -> None:
        """Blocks that no later row reads exact leave their exact slots."""
        sequence = self.sequences[step.sequence]
        if sequence.policy.storage == EXACT:
            return
        end = step.start + step.num_tokens
        last = self._exact_region(sequence).first_block(end // self.block_size)
        kept_exact = self._kept_exact(sequence)
        full = [
            holding
            for entry in range(1, last)
            for group, holding in enumerate(sequence.entries[entry])
            if group not in kept_exact
        ]
        for entry in range(1, last):
            known = (sequence.tokens, (entry + 1) * self.block_size)
            for holding in sequence.entries[entry]:
                if any(held.codec == EXACT for held in holding):
                    self._tokens |= {held: known for held in holding if held.codec != EXACT}
        retention = self._retention(sequence)
        if retention is not None and end % retention.epoch_tokens == 0:
            last = retention.counts(end).kept // self.block_size
            full += [holding for groups in sequence.survivors[1:last] for holding in groups]
        for holding in full:
            exact = {held for held in holding if held.codec == EXACT}
            holding -= exact
            self._free(step.sequence, exact)

    def _release(self, release: Release) -> None:
        sequence = self.sequences[release.sequence]
        released_below = sequence.released_below[release.group]
        assert released_below < release.below <= len(sequence.owners)
        for entry in range(max(release.after, released_below), release.below):
            self._free(release.sequence, sequence.entries[entry][release.group])
        sequence.released_below[release.group] = release.below
