"""The engine's orders to the ranks, and their answer. Both cross processes as msgpack.

Every rank gets the same plan and picks its own rows from it, so every branch that leads to a
collective is taken on numbers that all ranks share. A plan holds only what changed: each rank
keeps, per sequence, the block table that the plans so far have built.
"""

from collections.abc import Iterable

import msgspec

from kvcluster.types import Policy, Route, SamplingParams


class NewBlock(msgspec.Struct, frozen=True, array_like=True):
    """The next entry of a sequence's block table."""

    rank: int
    block_ids: tuple[int, ...]
    """One id per KV group (`ModelSpec.windows`), in that rank's pools of exact blocks; NO_BLOCK in
    groups where the entry has none."""
    encoded_ids: tuple[int, ...] = ()
    """Likewise, in its pools of the policy's codec, where the block goes when no row reads it exact
    any more: its exact block is free after that step. Empty: it stays exact."""


class SequenceStart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the ranks see for the first time."""

    sequence: int
    sampling: SamplingParams
    policy: Policy
    adopted: tuple[NewBlock, ...] = ()
    """The first entries of its block table: blocks that are computed already, in the forms that a
    sequence of this length holds. Its first step begins after them."""
    adopted_ids: bytes = b""
    """Their tokens, little-endian u32, where sampling counts tokens."""


class Scoring(msgspec.Struct, frozen=True, array_like=True):
    """Prompt tokens whose log probability the rows of a part give: those at positions
    [first, below), each predicted by the row before it."""

    first: int
    below: int
    next_id: int
    """The token after the part, which is among them if the part ends before `below`."""


class SequenceStep(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step: positions [start, start + num_tokens) are computed.

    The rank that owns a position's block computes that position's row and stores its K and V.
    """

    sequence: int
    start: int
    num_tokens: int
    token_ids: bytes
    """Little-endian u32 ids; empty: one token, the one this sequence sampled last (decode)."""
    appended: tuple[NewBlock, ...]
    """Table entries added before the step runs."""
    num_prompt_tokens: int
    """Where the output begins. While the prompt is on its way, a position at or after the part's
    end: all of the part is prompt."""
    samples: bool
    """The last row's logits give the sequence's next token."""
    route: Route = Route.PASS_KV
    scoring: Scoring | None = None
    survivors: tuple[NewBlock, ...] = ()
    """Entries added before the step runs to the table of the sequence's survivors, which has blocks
    in the KV group without a window only. The step ends an epoch."""


class Release(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that one KV group no longer reads: table entries from `after` to before `below`."""

    sequence: int
    group: int
    below: int
    after: int = 0


class Zeroed(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of one rank and KV group whose bytes are overwritten with zeros."""

    rank: int
    group: int
    codec: str
    """`EXACT` for exact blocks."""
    block_ids: tuple[int, ...]


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One forward pass of the ring group. Applied in order: zeroed, started, released, sequences,
    ended."""

    epoch: int
    """Ranks refuse plans of another epoch than their own."""
    step: int
    """1, 2, 3 … within an epoch, without gaps."""
    started: tuple[SequenceStart, ...] = ()
    sequences: tuple[SequenceStep, ...] = ()
    released: tuple[Release, ...] = ()
    ended: tuple[int, ...] = ()
    """Sequences that the ranks forget after this step."""
    zeroed: tuple[Zeroed, ...] = ()
    """Blocks that no sequence held when the plan was made. They are zeroed before anything is
    written, since sequences of this step may have taken them."""


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One of the most likely tokens."""

    token_id: int
    logprob: float


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """A sequence's next token. `position` is the place that the token takes in the sequence."""

    sequence: int
    position: int
    token_id: int
    logprob: float | None = None
    """Natural log, of the distribution before temperature, filters and penalties."""
    top: tuple[TopLogprob, ...] = ()


class ScoredTokens(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of consecutive prompt tokens from position `first` on."""

    sequence: int
    first: int
    logprobs: tuple[float, ...]
    """Natural logs, of the distribution as the model gives it."""
    top_token_ids: tuple[int, ...] = ()
    """The most likely ones at each position, as many for each as the request asks for."""
    top_logprobs: tuple[float, ...] = ()


class EncodingError(msgspec.Struct, frozen=True, array_like=True):
    """What encoding a sequence's blocks did to attention in one step on one rank, as two sums
    (defined in `attention/encoding_error.py`)."""

    sequence: int
    squared_error: float
    squared_size: float


class SequenceFailure(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that cannot go on, because of what its own rows or cache did on one rank. All
    ranks leave it out of every later step, whatever plans that are made already say."""

    sequence: int
    doing: str
    """What the rank was doing: "encoding blocks"."""
    kind: str
    """Class of the exception; empty: there was none."""


class RankAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What one rank found in a step."""

    sampled: tuple[SampledToken, ...] = ()
    scored: tuple[ScoredTokens, ...] = ()
    errors: tuple[EncodingError, ...] = ()
    failed: tuple[SequenceFailure, ...] = ()


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a step gave: the sampled tokens of all ranks, in the plan's order, and what they
    measured."""

    epoch: int
    step: int
    sampled: tuple[SampledToken, ...]
    scored: tuple[ScoredTokens, ...] = ()
    """In the plan's order, and by position."""
    errors: tuple[EncodingError, ...] = ()
    """Any number for each sequence: one for each rank that encoded blocks of it."""
    failed: tuple[SequenceFailure, ...] = ()
    """One for each rank on which a sequence failed. Nothing else here is of these sequences, nor of
    those that failed in an earlier step."""


def result_of(plan: StepPlan, answers: Iterable[RankAnswer]) -> StepResult:
    """The result of a step from what its ranks found."""
    answers = tuple(answers)
    failed = [failure for answer in answers for failure in answer.failed]
    is_over = {failure.sequence for failure in failed}
    place = {step.sequence: index for index, step in enumerate(plan.sequences)}
    sampled: list[SampledToken] = []
    scored: list[ScoredTokens] = []
    errors: list[EncodingError] = []
    for answer in answers:
        sampled += (token for token in answer.sampled if token.sequence not in is_over)
        scored += (tokens for tokens in answer.scored if tokens.sequence not in is_over)
        errors += (error for error in answer.errors if error.sequence not in is_over)
    return StepResult(
        plan.epoch,
        plan.step,
        tuple(sorted(sampled, key=lambda token: place[token.sequence])),
        tuple(sorted(scored, key=lambda tokens: (place[tokens.sequence], tokens.first))),
        tuple(errors),
        tuple(failed),
    )
