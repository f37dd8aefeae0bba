"""Chooses the next tokens from logits.

Random numbers are counter-based: for every (seed, position, token id) there is one uniform number,
and nothing else enters. A choice is the kept token with the largest logit / temperature + Gumbel
noise of that number, which draws from the softmax (Gumbel 1954; Maddison, Tarlow, Minka 2014).
So the same token comes out on every rank, in any batch, and when a sequence is resumed; and a
token that a filter removes does not change which of the others is drawn.

Shapes: R rows, V vocabulary, C tokens that filters keep.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from kvcluster.types import SamplingParams

_MASK: Final = (1 << 64) - 1
# SplitMix64 (Steele, Lea, Flood 2014): output n of the stream that starts at `state` is
# mix(state + n * gamma).
_GAMMA: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
_LIKELY_TOKENS: Final = 1024
"""Tokens to sort at first for top-p; seldom are more needed."""
_COLDEST: Final = 1e-30
"""At lower temperatures a float32 does not hold the quotients of logits, and no noise outweighs the
smallest difference of two of them: the likeliest token is drawn."""

NO_TOKEN: Final = -1
"""In place of the likeliest token, where a row's logits are no numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenChoice:
    """One sampled token. Logprobs are natural logs in the distribution as the model gave it,
    before temperature, filters and penalties."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the most likely tokens, likeliest first."""


@dataclass(slots=True)
class SequenceSampling:
    """What sampling has to remember of one sequence."""

    params: SamplingParams
    end_token_ids: tuple[int, ...] = ()
    """The model's end-of-sequence ids."""
    num_prompt_tokens: int = 0
    """Where the output begins. Must be right whenever the sequence is in a call of `sample`."""
    _uncounted: "array[int]" = field(default_factory=lambda: array("I"))
    _num_counted: int = 0
    _counts: "TokenCounts | None" = None

    @property
    def needs_tokens(self) -> bool:
        """Whether a penalty is set, so that the sequence's tokens must be handed to `append`."""
        return self.params.counts_tokens

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the choice is the likeliest token and nothing else is asked."""
        params = self.params
        return (
            params.temperature == 0.0
            and not params.logit_bias
            and params.logprobs is None
            and not params.min_output_tokens
            and not self.needs_tokens
        )

    def append(self, token_ids: Iterable[int]) -> None:
        """Add the sequence's next tokens, prompt and output alike, in order and without gaps.
        Keeps nothing when no penalty is set."""
        if self.needs_tokens:
            self._uncounted.extend(token_ids)

    def counts(self, like_V: Tensor) -> "TokenCounts":
        """Counts of the tokens so far, on the device of these logits. The next call changes
        them."""
        if self._counts is None:
            self._counts = TokenCounts(
                is_seen_V=torch.zeros_like(like_V, dtype=torch.bool),
                num_output_V=torch.zeros_like(like_V),
            )
        ids = torch.tensor(self._uncounted, dtype=torch.int64, device=like_V.device)
        output_ids = ids[max(0, self.num_prompt_tokens - self._num_counted) :]
        self._counts.is_seen_V[ids] = True
        self._counts.num_output_V.index_add_(
            0, output_ids, torch.ones_like(output_ids, dtype=like_V.dtype)
        )
        self._num_counted += len(ids)
        del self._uncounted[:]
        return self._counts


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Which tokens a sequence has, and how often its output has each."""

    is_seen_V: Tensor
    num_output_V: Tensor


def likeliest_tokens(logits_RV: Tensor) -> Tensor:
    """token_R of each row's largest logit; NO_TOKEN where that is not finite: some logit is NaN, or
    overflows, or all of them do."""
    largest = logits_RV.max(dim=-1)
    return largest.indices.masked_fill(~largest.values.isfinite(), NO_TOKEN)


def sample(
    logits_RV: Tensor,
    states: Sequence[SequenceSampling],
    positions: Sequence[int],
    *,
    likeliest_R: Tensor | None = None,
) -> list[TokenChoice]:
    """Choose a token for every row.

    `logits_RV` is float32 and is left unchanged; `positions` are the places that the chosen
    tokens will take in their sequences. `likeliest_R`: the token of each row's largest logit, where
    that is known. The caller appends the chosen tokens to the states.
    """
    if not states:
        return []
    likeliest = (logits_RV.argmax(dim=-1) if likeliest_R is None else likeliest_R).tolist()
    return [
        TokenChoice(token_id=token_id)
        if state.is_plain_greedy
        else _choose(logits_V, state, position)
        for logits_V, state, position, token_id in zip(
            logits_RV, states, positions, likeliest, strict=True
        )
    ]


def _choose(logits_V: Tensor, state: SequenceSampling, position: int) -> TokenChoice:
    params = state.params
    adjusted_V = _adjusted(logits_V, state, position)
    if params.temperature < _COLDEST:
        token_id = int(adjusted_V.argmax())
    else:
        # A model that overflows gives logits that are no numbers, and no comparison keeps those:
        # there must be a token all the same, or the step fails for every sequence in it.
        scaled_V = (adjusted_V / params.temperature).nan_to_num(-math.inf, math.inf, -math.inf)
        token_ids_C, logits_C = kept_tokens(scaled_V, params)
        noisy_C = logits_C.double() + gumbel_noise(params.seed, position, token_ids_C)
        token_id = int(token_ids_C[noisy_C.argmax()])
    if params.logprobs is None:
        return TokenChoice(token_id=token_id)
    logprobs_V = logits_V.log_softmax(dim=-1)
    top = logprobs_V.topk(min(params.logprobs, len(logprobs_V)))
    return TokenChoice(
        token_id=token_id,
        logprob=float(logprobs_V[token_id]),
        top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


def _adjusted(logits_V: Tensor, state: SequenceSampling, position: int) -> Tensor:
    """Logits after bias, penalties and the minimum length, in the order of transformers."""
    params = state.params
    logits_V = logits_V.clone()
    for token_id, bias in params.logit_bias:
        logits_V[token_id] += bias
    if state.needs_tokens:
        _penalize(logits_V, state)
    if position - state.num_prompt_tokens < params.min_output_tokens:
        ends = [*state.end_token_ids, *params.stop_token_ids]
        logits_V[ends] = -math.inf
    return logits_V


def _penalize(logits_V: Tensor, state: SequenceSampling) -> None:
    params = state.params
    counts = state.counts(logits_V)
    factor = params.repetition_penalty
    penalized_V = torch.where(logits_V < 0, logits_V * factor, logits_V / factor)
    logits_V.copy_(torch.where(counts.is_seen_V, penalized_V, logits_V))
    logits_V -= params.frequency_penalty * counts.num_output_V
    logits_V -= params.presence_penalty * (counts.num_output_V > 0)


def kept_tokens(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(token ids, logits) that top-k, top-p and min-p leave, applied in this order to logits that
    are already divided by the temperature, each a number or infinite. Never empty; in no particular
    order."""
    vocab_size = len(logits_V)
    if 0 < params.top_k < vocab_size:
        # Ties with the last one stay.
        smallest = logits_V.topk(params.top_k).values[-1]
        token_ids_C = (logits_V >= smallest).nonzero().squeeze(1)
    else:
        token_ids_C = torch.arange(vocab_size, device=logits_V.device)
    logits_C = logits_V[token_ids_C]
    if params.top_p < 1.0:
        order_C = _nucleus(logits_C, params.top_p)
        token_ids_C, logits_C = token_ids_C[order_C], logits_C[order_C]
    if params.min_p > 0.0:
        is_kept_C = logits_C >= logits_C.max() + math.log(params.min_p)
        token_ids_C, logits_C = token_ids_C[is_kept_C], logits_C[is_kept_C]
    return token_ids_C, logits_C


def _nucleus(logits_C: Tensor, top_p: float) -> Tensor:
    """Indices of the likeliest tokens that together reach probability top_p, and at least one."""
    logits_C = logits_C.double()
    total = logits_C.logsumexp(dim=-1)
    for num_likely in (min(_LIKELY_TOKENS, len(logits_C)), len(logits_C)):
        likely = logits_C.topk(num_likely)
        cumulative = (likely.values - total).exp().cumsum(dim=-1)
        if cumulative[-1] >= top_p:
            break
    before = cumulative.roll(1)
    before[0] = -1.0
    return likely.indices[before < top_p]


def gumbel_noise(seed: int, position: int, token_ids_C: Tensor) -> Tensor:
    """Gumbel noise of each token, float64: a function of (seed, position, token id) alone."""
    state = _mix(_mix(seed & _MASK) + position * _GAMMA & _MASK)
    # int64 arithmetic wraps around like uint64; only the shifts have to be made logical.
    bits = (token_ids_C + 1) * _signed(_GAMMA) + _signed(state)
    bits = (bits ^ _shifted(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_MIX_2)
    bits = bits ^ _shifted(bits, 31)
    # The middle of one of 2^52 intervals, exactly: neither 0 nor 1, whose logs are infinite.
    uniform_C = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform_C))


def _mix(value: int) -> int:
    value = (value ^ (value >> 30)) * _MIX_1 & _MASK
    value = (value ^ (value >> 27)) * _MIX_2 & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)
