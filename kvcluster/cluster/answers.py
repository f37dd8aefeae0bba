"""What a rank has to say of a step: the tokens it sampled, what it measured, what failed.

Shape letters: R rows, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from torch import Tensor

from kvcluster.attention.failures import PartFailure
from kvcluster.attention.part import SequencePart
from kvcluster.cluster.scoring import scored_by
from kvcluster.cluster.step_rows import Rows
from kvcluster.engine.plan import (
    EncodingError,
    SampledToken,
    ScoredTokens,
    SequenceFailure,
    TopLogprob,
)
from kvcluster.log import get_logger
from kvcluster.model.sampler import NO_TOKEN, likeliest_tokens, sample

PREDICTING: Final = "predicting, where the logits are no numbers"

log = get_logger(__name__)


def answering_ranks(rows: Sequence[Rows], num_ranks: int) -> tuple[int, ...]:
    """The ranks whose answer the others wait for, ascending: the same on every rank. All of them
    where some cache is compressed, at which each may have failed."""
    if any(row.is_compressed for row in rows):
        return tuple(range(num_ranks))
    answering: set[int] = set()
    for row in rows:
        if row.sampling_rank is not None:
            answering.add(row.sampling_rank)
        if row.step.scoring is not None:
            answering |= {rank for rank in range(num_ranks) if scored_by(row.step, row.part, rank)}
    return tuple(sorted(answering))


def sampled_tokens(
    here: Sequence[Rows], logits_RV: Tensor, likeliest_R: Tensor | None = None
) -> tuple[tuple[SampledToken, ...], tuple[SequenceFailure, ...]]:
    """The next token of each of these sequences, or that it has none. `likeliest_R`: as
    `likeliest_tokens` gives them, where they are known."""
    if not here:
        return (), ()
    if likeliest_R is None:
        likeliest_R = likeliest_tokens(logits_RV)
    is_number_R = likeliest_R != NO_TOKEN
    is_number = is_number_R.tolist()
    failed = [row for row, samples in zip(here, is_number, strict=True) if not samples]
    if failed:
        logits_RV, likeliest_R = logits_RV[is_number_R], likeliest_R[is_number_R]
        here = [row for row in here if row not in failed]
    for row in here:
        row.state.sampling.num_prompt_tokens = row.step.num_prompt_tokens
    positions = [row.step.start + row.step.num_tokens for row in here]
    states = [row.state.sampling for row in here]
    choices = sample(logits_RV, states, positions, likeliest_R=likeliest_R)
    sampled = tuple(
        SampledToken(
            row.step.sequence,
            position,
            choice.token_id,
            choice.logprob,
            tuple(TopLogprob(token_id, logprob) for token_id, logprob in choice.top),
        )
        for row, position, choice in zip(here, positions, choices, strict=True)
    )
    return sampled, no_numbers(failed)


def unscored(rows: Sequence[Rows], scored: Iterable[ScoredTokens]) -> tuple[SequenceFailure, ...]:
    """Of the rows that give some token no log probability."""
    over = {tokens.sequence for tokens in scored if any(map(math.isnan, tokens.logprobs))}
    return no_numbers(row for row in rows if row.step.sequence in over)


def encoding_errors(
    rows: Sequence[Rows], errors: Mapping[SequencePart, tuple[float, float]]
) -> tuple[EncodingError, ...]:
    """See `EncodingErrors.sums`."""
    return tuple(
        EncodingError(row.step.sequence, *errors[row.part]) for row in rows if row.part in errors
    )


def no_numbers(rows: Iterable[Rows]) -> tuple[SequenceFailure, ...]:
    """Of rows whose logits are no numbers: no token follows from them."""
    rows = list(rows)
    failure = PartFailure(PREDICTING)
    return sequence_failures(rows, {row.part: failure for row in rows})


def sequence_failures(
    rows: Sequence[Rows], failures: Mapping[SequencePart, PartFailure]
) -> tuple[SequenceFailure, ...]:
    """The sequences that failed in a step. Each is logged."""
    failed = [row for row in rows if row.part in failures]
    for row in failed:
        doing, kind = failures[row.part]
        rank, sequence = row.part.rank, row.step.sequence
        log.error("sequence_failed", rank=rank, sequence=sequence, phase=doing, error=kind)
    return tuple(SequenceFailure(row.step.sequence, *failures[row.part]) for row in failed)
