"""A ring group without a model: it keeps what workers keep, distrusts every plan, and 'samples' a
hash of all tokens that a sequence holds. So equal tokens mean that equal tokens were computed.
"""

import hashlib
from array import array
from dataclasses import dataclass, field

from kvcluster.engine.plan import Release, SampledToken, SequenceStep, StepPlan, StepResult
from kvcluster.types import ModelSpec, SamplingParams


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


@dataclass
class FakeSequence:
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    """Tokens whose K and V are stored."""
    sampled: int | None = None
    owners: list[int] = field(default_factory=list)
    block_ids: list[tuple[int, ...]] = field(default_factory=list)
    released_below: list[int] = field(default_factory=list)


class FakeRing:
    """Runs plans like a ring group's ranks would, and asserts what they rely on."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        block_size: int,
        pool_sizes: list[tuple[int, ...]],
        epoch: int = 1,
    ) -> None:
        self.spec = spec
        self.epoch = epoch
        self.num_steps = 0
        self.num_empty_steps = 0
        self.sequences: dict[int, FakeSequence] = {}
        self.block_size = block_size
        self.pool_sizes = pool_sizes
        self._known: set[int] = set()
        self._users: dict[tuple[int, int, int], int] = {}
        """(rank, group, block id) -> sequence."""

    @property
    def num_used(self) -> int:
        return len(self._users)

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.epoch == self.epoch
        assert plan.step == self.num_steps + 1
        self.num_steps += 1
        self.num_empty_steps += not plan.sequences
        for start in plan.started:
            assert start.sequence not in self._known, "a sequence number is never used twice"
            self._known.add(start.sequence)
            self.sequences[start.sequence] = FakeSequence(
                start.sampling, released_below=[0] * len(self.spec.windows)
            )
        for release in plan.released:
            self._release(release)
        for step in plan.sequences:
            self._append_blocks(step)
        assert len({step.sequence for step in plan.sequences}) == len(plan.sequences)
        sampled = [token for step in plan.sequences for token in self._run(step)]
        for sequence in plan.ended:
            for group in range(len(self.spec.windows)):
                self._free(sequence, group, len(self.sequences[sequence].owners))
            del self.sequences[sequence]
        return StepResult(plan.epoch, plan.step, tuple(sampled))

    def _append_blocks(self, step: SequenceStep) -> None:
        sequence = self.sequences[step.sequence]
        for block in step.appended:
            assert len(block.block_ids) == len(self.spec.windows)
            for group, block_id in enumerate(block.block_ids):
                assert 0 <= block_id < self.pool_sizes[block.rank][group]
                key = (block.rank, group, block_id)
                assert key not in self._users, "a block has one user"
                self._users[key] = step.sequence
            sequence.owners.append(block.rank)
            sequence.block_ids.append(block.block_ids)

    def _run(self, step: SequenceStep) -> list[SampledToken]:
        sequence = self.sequences[step.sequence]
        end = step.start + step.num_tokens
        assert step.num_tokens > 0
        assert step.start == len(sequence.tokens), "positions are computed once, in order"
        blocks = -(-end // self.block_size)
        assert len(sequence.owners) == blocks, "a table covers what is computed and no more"
        assert step.samples or end % self.block_size == 0, "chunks end with a block or the tokens"
        for group, window in enumerate(self.spec.windows):
            oldest_read = 0 if window is None else max(0, step.start - window + 1)
            assert sequence.released_below[group] <= oldest_read // self.block_size
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
        if not step.samples:
            return []
        assert 0 < step.num_prompt_tokens <= end
        sequence.sampled = next_token(sequence.tokens, sequence.sampling, self.spec.vocab_size)
        return [SampledToken(step.sequence, end, sequence.sampled)]

    def _release(self, release: Release) -> None:
        sequence = self.sequences[release.sequence]
        assert sequence.released_below[release.group] < release.below <= len(sequence.owners)
        self._free(release.sequence, release.group, release.below)

    def _free(self, sequence_id: int, group: int, below: int) -> None:
        sequence = self.sequences[sequence_id]
        for entry in range(sequence.released_below[group], below):
            key = (sequence.owners[entry], group, sequence.block_ids[entry][group])
            assert self._users.pop(key) == sequence_id
        sequence.released_below[group] = below
