"""Measures what policies cost: likelihood, divergence and recall, beside the exact cache.

Each text and document is run once with the exact cache and once with each policy, each time in
one forward pass. Of the exact pass the hidden states are kept, and predictions are compared some
rows at a time.

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
    """A `LayerAttention` that says how many bytes its cache takes, and how much of it is read."""

    def stored(self) -> StoredBytes: ...

    def read_share(self) -> float: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPolicy:
    """A name, and the attention of one pass over one whole sequence."""

    name: str
    attention: Callable[[ModelSpec], CountingAttention]
    run_tokens: int | None = None
    """Positions of one forward pass; None: the whole sequence."""


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
        device=device_name(model.device),
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExactText:
    """A text, and what the model makes of it with the exact cache."""

    text: Text
    token_ids_T: Tensor
    first_scored: int
    """Position of the first token whose prediction counts."""
    states_RE: Tensor
    """Hidden states that predict the tokens from there on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactDocument:
    """A document, and which answers the model finds with the exact cache."""

    document: NeedleDocument
    found: tuple[bool, ...]


def exact_text(
    model: LoadedModel, text: Text, token_ids_T: Tensor, *, first_scored: int = FIRST_SCORED
) -> ExactText:
    """Run the exact cache over the text; its tokens from position `first_scored` (at least 1) on
    will count.

    Raises: ValueError for more tokens than the model can read, or none to score.
    """
    if not 1 <= first_scored < len(token_ids_T):
        raise ValueError(f"first_scored is {first_scored}, of {len(token_ids_T)} tokens")
    states_TE, _ = _run(model, EXACT, token_ids_T)
    return ExactText(
        text=text,
        token_ids_T=token_ids_T,
        first_scored=first_scored,
        states_RE=states_TE[_scored_rows(first_scored)].clone(),
    )


def exact_document(model: LoadedModel, document: NeedleDocument) -> ExactDocument:
    """Run the exact cache over the document.

    Raises: ValueError for more tokens than the model can read.
    """
    states_TE, _ = _run(model, EXACT, torch.tensor(document.token_ids, dtype=torch.int64))
    return ExactDocument(document=document, found=tuple(found(model, states_TE, document)))


def text_score(model: LoadedModel, policy: MeasuredPolicy, exact: ExactText) -> TextScore:
    """Run the policy over the text and compare it with the exact cache, token by token."""
    states_TE, attention = _run(model, policy, exact.token_ids_T)
    tokens = _compare(
        model,
        exact.states_RE,
        states_TE[_scored_rows(exact.first_scored)],
        exact.token_ids_T[exact.first_scored :].to(model.device),
    )
    increase = mean_over_spans(tokens.nll_R - tokens.exact_nll_R)
    return TextScore(
        policy=policy.name,
        text=exact.text.name,
        text_digest=exact.text.digest,
        num_tokens=len(exact.token_ids_T),
        first_scored=exact.first_scored,
        exact_nll=float(tokens.exact_nll_R.double().mean()),
        nll_increase=increase,
        perplexity_increase_percent=perplexity_increase(increase),
        kl=mean_over_spans(tokens.kl_R),
        top1_agreement=mean_over_spans(tokens.is_same_R),
        storage=Storage.of(attention.stored()),
        read_share=attention.read_share(),
    )


def recall_score(model: LoadedModel, policy: MeasuredPolicy, exact: ExactDocument) -> RecallScore:
    """Run the policy over the document and see which answers it finds."""
    document = exact.document
    states_TE, attention = _run(model, policy, torch.tensor(document.token_ids, dtype=torch.int64))
    by_policy = found(model, states_TE, document)
    needles = tuple(
        NeedleScore(
            key=question.key,
            depth=question.depth,
            is_found=is_found,
            is_found_by_exact=is_found_by_exact,
        )
        for question, is_found, is_found_by_exact in zip(
            document.questions, by_policy, exact.found, strict=True
        )
    )
    return RecallScore(
        policy=policy.name,
        document=document.name,
        num_tokens=len(document.token_ids),
        needles=needles,
        num_found=sum(by_policy),
        num_found_by_exact=sum(exact.found),
        num_found_of_exact=sum(n.is_found and n.is_found_by_exact for n in needles),
        storage=Storage.of(attention.stored()),
    )


def score_text(
    model: LoadedModel,
    policies: Sequence[MeasuredPolicy],
    text: Text,
    token_ids_T: Tensor,
    *,
    first_scored: int = FIRST_SCORED,
) -> Iterator[TextScore]:
    """Score each policy on the tokens from position `first_scored` (at least 1) on.

    Raises: ValueError for more tokens than the model can read, or none to score.
    """
    exact = exact_text(model, text, token_ids_T, first_scored=first_scored)
    for policy in policies:
        yield text_score(model, policy, exact)


def score_recall(
    model: LoadedModel, policies: Sequence[MeasuredPolicy], document: NeedleDocument
) -> Iterator[RecallScore]:
    """Score each policy on the document's questions.

    Raises: ValueError for more tokens than the model can read."""
    exact = exact_document(model, document)
    for policy in policies:
        yield recall_score(model, policy, exact)


def found(model: LoadedModel, states_TE: Tensor, document: NeedleDocument) -> list[bool]:
    """Whether greedy decoding gives each answer, after the document up to its question."""
    answers = [range(question.answer_from, question.answer_to) for question in document.questions]
    wanted_R = torch.tensor([document.token_ids[p] for answer in answers for p in answer])
    rows_R = torch.tensor([p - 1 for answer in answers for p in answer], device=model.device)
    parts = []
    for rows in row_slices(model, len(rows_R)):
        best_R = logits_of(model, states_TE[rows_R[rows]]).argmax(dim=-1)
        parts.append(best_R.cpu() == wanted_R[rows])
    by_answer = torch.split(torch.cat(parts), [len(answer) for answer in answers])
    return [bool(is_right_R.all()) for is_right_R in by_answer]


EXACT: Final = strict_policy("exact", lambda _layer: None, ExactTokens(block_size=64))


def _run(
    model: LoadedModel, policy: MeasuredPolicy, token_ids_T: Tensor
) -> tuple[Tensor, CountingAttention]:
    if len(token_ids_T) > model.spec.max_context_tokens:
        raise ValueError(
            f"{len(token_ids_T)} tokens, and {model.spec.name} reads at most "
            f"{model.spec.max_context_tokens}"
        )
    attention = policy.attention(model.spec)
    states_TE = final_states(model, token_ids_T, attention, run_tokens=policy.run_tokens)
    return states_TE, attention


@dataclass(frozen=True, slots=True)
class _Compared:
    exact_nll_R: Tensor
    nll_R: Tensor
    kl_R: Tensor
    is_same_R: Tensor


def _compare(
    model: LoadedModel, exact_RE: Tensor, states_RE: Tensor, wanted_R: Tensor
) -> _Compared:
    parts: list[tuple[Tensor, ...]] = []
    for rows in row_slices(model, len(wanted_R)):
        wanted_R1 = wanted_R[rows, None]
        exact_RV = logits_of(model, exact_RE[rows]).log_softmax(dim=-1)
        policy_RV = logits_of(model, states_RE[rows]).log_softmax(dim=-1)
        exact_nll_R = -exact_RV.gather(1, wanted_R1)[:, 0]
        nll_R = -policy_RV.gather(1, wanted_R1)[:, 0]
        is_same_R = exact_RV.argmax(dim=-1) == policy_RV.argmax(dim=-1)
        kl_R = (exact_RV.exp() * (exact_RV - policy_RV)).sum(dim=-1)
        parts.append((exact_nll_R, nll_R, kl_R, is_same_R.float()))
    return _Compared(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _scored_rows(first_scored: int) -> slice:
    """The token at a position is predicted by the row before it."""
    return slice(first_scored - 1, -1)


def perplexity_increase(nll_increase: Mean) -> Mean:
    """In percent, for a mean increase of the negative log-likelihood in nats."""
    factor = math.exp(nll_increase.value)
    error = nll_increase.standard_error
    return Mean(
        value=100 * (factor - 1),
        standard_error=None if error is None else 100 * factor * error,
    )


def device_name(device: torch.device) -> str:
    """What a report calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
