"""Measures what policies cost: likelihood, divergence and recall, beside the exact cache.

Each text and document is run once with the exact cache and once with each policy, each time in
one forward pass. Their predictions are then compared some rows at a time.

Shape letters: T tokens, E hidden dimension, R rows, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from kvcluster.model.attention_hook import LayerAttention
from kvcluster.model.loader import LoadedModel
from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.quality.needles import NeedleDocument
from kvcluster.quality.passes import final_states, logits_of, row_slices
from kvcluster.quality.records import (
    NeedleScore,
    QualityReport,
    RecallScore,
    Storage,
    TextScore,
)
from kvcluster.quality.spans import Mean, mean_over_spans
from kvcluster.quality.stored import StoredBytes
from kvcluster.quality.strict import CodecsOfLayer, ExactTokens, StrictAttention
from kvcluster.quality.texts import Text
from kvcluster.types import ModelSpec

FIRST_SCORED: Final = 1024
"""Tokens before this position read little that is compressed, and would hide the damage."""
_CHARACTERS_PER_TOKEN: Final = 16
"""More than any text that is measured has on average."""


class CountingAttention(LayerAttention, Protocol):
    """A `LayerAttention` that says how many bytes its cache takes."""

    def stored(self) -> StoredBytes: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPolicy:
    """A name, and the attention of one pass over one whole sequence."""

    name: str
    attention: Callable[[ModelSpec], CountingAttention]


def strict_policy(name: str, codecs_of_layer: CodecsOfLayer, exact: ExactTokens) -> MeasuredPolicy:
    """A policy that compresses with codecs: see `StrictAttention`."""
    return MeasuredPolicy(
        name=name, attention=lambda spec: StrictAttention(spec, codecs_of_layer, exact)
    )


def measure(
    model: LoadedModel,
    tokenizer: TextTokenizer,
    policies: Sequence[MeasuredPolicy],
    texts: Sequence[Text],
    documents: Sequence[NeedleDocument],
    *,
    num_tokens: int | None = None,
    first_scored: int = FIRST_SCORED,
) -> QualityReport:
    """Score every policy on every text and document. Takes minutes on a CPU; blocks.

    Of a text, the first `num_tokens` tokens count, by default as many as the model can read. A
    policy that leaves the cache as it is may be among the policies, to see the rounding.
    Raises: ValueError for texts that are too short, texts and documents that are longer than the
    model can read, and from codecs that do not fit its heads.
    """
    length = num_tokens or model.spec.max_context_tokens
    return QualityReport(
        model=model.spec.name,
        weights_digest=model.spec.weights_digest,
        tokenizer_digest=model.spec.tokenizer_digest,
        dtype=model.spec.dtype,
        device=_device_name(model.device),
        texts=tuple(
            score
            for text in texts
            for score in score_text(
                model,
                policies,
                text,
                text_tokens(tokenizer, text, length),
                first_scored=first_scored,
            )
        ),
        recall=tuple(
            score for document in documents for score in score_recall(model, policies, document)
        ),
    )


def text_tokens(tokenizer: TextTokenizer, text: Text, num_tokens: int) -> Tensor:
    """The first tokens of a text, int64, with what the tokenizer puts before a prompt.

    Raises: ValueError for a text that is too short.
    """
    encoder = tokenizer.prompt_encoder()
    ids = [*encoder.push(text.content[: num_tokens * _CHARACTERS_PER_TOKEN]), *encoder.finish()]
    if len(ids) < num_tokens:
        raise ValueError(f"text {text.name} has {len(ids)} tokens, not {num_tokens}")
    return torch.tensor(ids[:num_tokens], dtype=torch.int64)


def score_text(
    model: LoadedModel,
    policies: Sequence[MeasuredPolicy],
    text: Text,
    token_ids_T: Tensor,
    *,
    first_scored: int = FIRST_SCORED,
) -> Iterator[TextScore]:
    """Score each policy on the tokens from position `first_scored` (at least 1) on.

    Keeps the hidden states of all policies at one time.
    Raises: ValueError for more tokens than the model can read, or none to score.
    """
    if not 1 <= first_scored < len(token_ids_T):
        raise ValueError(f"first_scored is {first_scored}, of {len(token_ids_T)} tokens")
    # The token at a position is predicted by the row before it.
    rows = slice(first_scored - 1, -1)
    exact_TE, _ = _run(model, EXACT, token_ids_T)
    runs = [_run(model, policy, token_ids_T) for policy in policies]
    compared = _compare(
        model,
        exact_TE[rows],
        [states_TE[rows] for states_TE, _ in runs],
        token_ids_T[first_scored:].to(model.device),
    )
    for policy, (_, stored), tokens in zip(policies, runs, compared, strict=True):
        increase = mean_over_spans(tokens.nll_R - tokens.exact_nll_R)
        yield TextScore(
            policy=policy.name,
            text=text.name,
            text_digest=text.digest,
            num_tokens=len(token_ids_T),
            first_scored=first_scored,
            exact_nll=float(tokens.exact_nll_R.double().mean()),
            nll_increase=increase,
            perplexity_increase_percent=_perplexity_increase(increase),
            kl=mean_over_spans(tokens.kl_R),
            top1_agreement=mean_over_spans(tokens.is_same_R),
            storage=Storage.of(stored),
        )


def score_recall(
    model: LoadedModel, policies: Sequence[MeasuredPolicy], document: NeedleDocument
) -> Iterator[RecallScore]:
    """Score each policy on the document's questions.

    Raises: ValueError for more tokens than the model can read."""
    token_ids_T = torch.tensor(document.token_ids, dtype=torch.int64)
    exact_TE, _ = _run(model, EXACT, token_ids_T)
    by_exact = found(model, exact_TE, document)
    for policy in policies:
        states_TE, stored = _run(model, policy, token_ids_T)
        by_policy = found(model, states_TE, document)
        needles = tuple(
            NeedleScore(
                key=question.key,
                depth=question.depth,
                is_found=is_found,
                is_found_by_exact=is_found_by_exact,
            )
            for question, is_found, is_found_by_exact in zip(
                document.questions, by_policy, by_exact, strict=True
            )
        )
        yield RecallScore(
            policy=policy.name,
            document=document.name,
            num_tokens=len(token_ids_T),
            needles=needles,
            num_found=sum(by_policy),
            num_found_by_exact=sum(by_exact),
            num_found_of_exact=sum(n.is_found and n.is_found_by_exact for n in needles),
            storage=Storage.of(stored),
        )


def found(model: LoadedModel, states_TE: Tensor, document: NeedleDocument) -> list[bool]:
    """Whether greedy decoding gives each answer, after the document up to its question."""
    answers = [range(question.answer_from, question.answer_to) for question in document.questions]
    wanted_R = torch.tensor([document.token_ids[p] for answer in answers for p in answer])
    rows_R = torch.tensor([p - 1 for answer in answers for p in answer], device=model.device)
    parts = []
    for rows in row_slices(len(rows_R), model.spec.vocab_size):
        best_R = logits_of(model, states_TE[rows_R[rows]]).argmax(dim=-1)
        parts.append(best_R.cpu() == wanted_R[rows])
    by_answer = torch.split(torch.cat(parts), [len(answer) for answer in answers])
    return [bool(is_right_R.all()) for is_right_R in by_answer]


EXACT: Final = strict_policy("exact", lambda _layer: None, ExactTokens(block_size=64))


def _run(
    model: LoadedModel, policy: MeasuredPolicy, token_ids_T: Tensor
) -> tuple[Tensor, StoredBytes]:
    if len(token_ids_T) > model.spec.max_context_tokens:
        raise ValueError(
            f"{len(token_ids_T)} tokens, and {model.spec.name} reads at most "
            f"{model.spec.max_context_tokens}"
        )
    attention = policy.attention(model.spec)
    return final_states(model, token_ids_T, attention), attention.stored()


@dataclass(frozen=True, slots=True)
class _Compared:
    exact_nll_R: Tensor
    nll_R: Tensor
    kl_R: Tensor
    is_same_R: Tensor


def _compare(
    model: LoadedModel, exact_RE: Tensor, states_RE: Sequence[Tensor], wanted_R: Tensor
) -> list[_Compared]:
    """One result for each policy's states."""
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in states_RE]
    for rows in row_slices(len(wanted_R), model.spec.vocab_size):
        wanted_R1 = wanted_R[rows, None]
        exact_RV = logits_of(model, exact_RE[rows]).log_softmax(dim=-1)
        exact_nll_R = -exact_RV.gather(1, wanted_R1)[:, 0]
        for policy_parts, policy_RE in zip(parts, states_RE, strict=True):
            policy_RV = logits_of(model, policy_RE[rows]).log_softmax(dim=-1)
            nll_R = -policy_RV.gather(1, wanted_R1)[:, 0]
            is_same_R = exact_RV.argmax(dim=-1) == policy_RV.argmax(dim=-1)
            kl_R = (exact_RV.exp() * (exact_RV - policy_RV)).sum(dim=-1)
            policy_parts.append((exact_nll_R, nll_R, kl_R, is_same_R.float()))
    return [
        _Compared(*(torch.cat(column) for column in zip(*policy_parts, strict=True)))
        for policy_parts in parts
    ]


def _perplexity_increase(nll_increase: Mean) -> Mean:
    factor = math.exp(nll_increase.value)
    error = nll_increase.standard_error
    return Mean(
        value=100 * (factor - 1),
        standard_error=None if error is None else 100 * factor * error,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
