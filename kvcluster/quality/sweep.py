"""Measures many policies on one model: the exact cache reads each text once, then one by one.

A sweep that is cut off goes on where it was: what its report already holds is skipped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from kvcluster.errors import ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.measure import (
    FIRST_SCORED,
    ExactDocument,
    ExactText,
    device_name,
    exact_document,
    exact_text,
    recall_score,
    text_score,
)
from kvcluster.quality.needles import NeedleDocument
from kvcluster.quality.served import ServedPolicy
from kvcluster.quality.sweep_records import (
    CalibratedOn,
    RecipeScore,
    ScoredText,
    SweepReport,
    SweepSubject,
    read_report,
    scored_document,
    write_report,
)
from kvcluster.quality.texts import Text
from kvcluster.types import ModelSpec

_Score = TypeVar("_Score")


def _nothing() -> None: ...


def _then(after_pass: Callable[[], None], score: _Score) -> _Score:
    after_pass()
    return score


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadOnce:
    """The texts and documents of a sweep as the exact cache reads them; all on one device."""

    subject: SweepSubject
    texts: tuple[ExactText, ...]
    documents: tuple[ExactDocument, ...]


def read_once(
    model: LoadedModel,
    texts: Sequence[tuple[Text, Tensor]],
    documents: Sequence[NeedleDocument],
    *,
    block_size: int,
    exact_recent_tokens: int,
    first_scored: int = FIRST_SCORED,
    after_pass: Callable[[], None] = _nothing,
) -> ReadOnce:
    """Run the exact cache over everything. `texts` come with their token ids, all of one length.

    Raises: ValueError for more tokens than the model can read, or none to score.
    """
    return ReadOnce(
        subject=sweep_subject(
            model.spec,
            texts,
            documents,
            block_size=block_size,
            exact_recent_tokens=exact_recent_tokens,
            first_scored=first_scored,
        ),
        texts=tuple(
            _then(after_pass, exact_text(model, text, token_ids_T, first_scored=first_scored))
            for text, token_ids_T in texts
        ),
        documents=tuple(
            _then(after_pass, exact_document(model, document)) for document in documents
        ),
    )


def sweep_subject(
    spec: ModelSpec,
    texts: Sequence[tuple[Text, Tensor]],
    documents: Sequence[NeedleDocument],
    *,
    block_size: int,
    exact_recent_tokens: int,
    first_scored: int,
) -> SweepSubject:
    """What is measured on what. Raises: ValueError for texts of different lengths."""
    lengths = {len(token_ids_T) for _, token_ids_T in texts}
    if len(lengths) > 1:
        raise ValueError(f"want texts of one length, got {sorted(lengths)} tokens")
    return SweepSubject(
        model=spec.name,
        weights_digest=spec.weights_digest,
        tokenizer_digest=spec.tokenizer_digest,
        dtype=spec.dtype,
        block_size=block_size,
        exact_recent_tokens=exact_recent_tokens,
        num_tokens=next(iter(lengths), 0),
        first_scored=first_scored,
        texts=tuple(ScoredText(name=text.name, digest=text.digest) for text, _ in texts),
        documents=tuple(scored_document(document) for document in documents),
    )


def earlier_report(path: Path, subject: SweepSubject) -> SweepReport:
    """The report that a sweep goes on with: that of the file, or an empty one.

    Raises: ConfigError when the file is of another subject, or no report.
    """
    if not path.exists():
        return SweepReport(subject=subject)
    report = read_report(path)
    if report.subject != subject:
        raise ConfigError(
            f"{path} holds scores of another model, of other texts, documents or lengths, or of "
            "other blocks or exact tokens: name another file"
        )
    return report


def sweep(
    model: LoadedModel,
    exact: ReadOnce,
    policies: Sequence[ServedPolicy],
    report: SweepReport,
    *,
    keep: Callable[[SweepReport], None],
    calibrated_on: CalibratedOn | None = None,
    after_pass: Callable[[], None] = _nothing,
) -> SweepReport:
    """Score the policies that `report` does not have yet, and call `keep` after each, and
    `after_pass` after each text and document."""
    for policy in policies:
        if not report.has(policy.name):
            made_with = calibrated_on if policy.needs_calibration else None
            report = report.with_score(_score(model, exact, policy, made_with, after_pass))
            keep(report)
    return report


def keep_in(path: Path) -> Callable[[SweepReport], None]:
    """A `keep` that writes the file."""
    return lambda report: write_report(path, report)


def _score(
    model: LoadedModel,
    exact: ReadOnce,
    policy: ServedPolicy,
    calibrated_on: CalibratedOn | None,
    after_pass: Callable[[], None],
) -> RecipeScore:
    started = time.monotonic()
    measured = policy.measured
    texts = tuple(_then(after_pass, text_score(model, measured, text)) for text in exact.texts)
    recall = tuple(
        _then(after_pass, recall_score(model, measured, document)) for document in exact.documents
    )
    return RecipeScore(
        policy=policy.name,
        device=device_name(model.device),
        seconds=time.monotonic() - started,
        texts=texts,
        recall=recall,
        calibrated_on=calibrated_on,
    )
