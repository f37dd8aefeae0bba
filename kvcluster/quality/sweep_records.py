"""What a sweep of policies over one model hands back, its JSON, and the numbers that are compared.

The JSON is rewritten after every policy, so that a run that is cut off keeps what it measured.
"""

import hashlib
import math
import os
from pathlib import Path

import msgspec

from kvcluster.codec.calibration import Calibration
from kvcluster.errors import ConfigError
from kvcluster.quality.needles import NeedleDocument
from kvcluster.quality.records import RecallScore, Storage, TextScore
from kvcluster.quality.spans import Mean
from kvcluster.quality.tasks import TASKS


class ScoredText(msgspec.Struct, frozen=True, kw_only=True):
    """A text that policies were measured on."""

    name: str
    digest: str


class SweepSubject(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on what. Scores compare only where all of this is equal."""

    model: str
    weights_digest: str
    tokenizer_digest: str
    dtype: str
    """In which the model computed."""
    block_size: int
    exact_recent_tokens: int
    """Latest tokens that are read exact, beside the open block."""
    num_tokens: int
    """Of each text."""
    first_scored: int
    texts: tuple[ScoredText, ...]
    documents: tuple[ScoredText, ...]
    """By their token ids."""
    num_ranks: int = 0
    """Of the cluster that served; 0: one pass without a cluster."""


class CalibratedOn(msgspec.Struct, frozen=True, kw_only=True):
    """What latent bases were made from."""

    num_tokens: int
    text_digests: tuple[str, ...]

    @classmethod
    def of(cls, calibration: Calibration | None) -> "CalibratedOn | None":
        if calibration is None:
            return None
        return cls(num_tokens=calibration.num_tokens, text_digests=calibration.text_digests)


class RecipeScore(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on all texts and documents."""

    policy: str
    """Canonical."""
    device: str
    seconds: float
    texts: tuple[TextScore, ...]
    recall: tuple[RecallScore, ...]
    """Of the documents with needles, and of the tasks."""
    calibrated_on: CalibratedOn | None = None
    """None: the policy needs no calibration."""

    @property
    def storage(self) -> Storage:
        """Of the longest text, or where there is none, the longest document."""
        scores: tuple[TextScore | RecallScore, ...] = self.texts or self.recall
        return max(scores, key=lambda score: score.num_tokens).storage

    @property
    def perplexity_increase_percent(self) -> Mean | None:
        """Mean over texts, with the error that the errors within the texts leave it. None: no text
        was read."""
        return _mean([score.perplexity_increase_percent for score in self.texts])

    @property
    def worst_text(self) -> TextScore | None:
        """The text whose perplexity rose most."""
        if not self.texts:
            return None
        return max(self.texts, key=lambda score: score.perplexity_increase_percent.value)

    @property
    def kl(self) -> Mean | None:
        return _mean([score.kl for score in self.texts if score.kl is not None])

    @property
    def top1_agreement(self) -> Mean | None:
        return _mean([score.top1_agreement for score in self.texts])

    @property
    def read_share(self) -> float:
        """Mean over texts; 1 where none was read."""
        if not self.texts:
            return 1.0
        return sum(score.read_share for score in self.texts) / len(self.texts)

    @property
    def needles(self) -> tuple[RecallScore, ...]:
        """Of the documents with needles."""
        return tuple(score for score in self.recall if score.kind not in TASKS)

    @property
    def tasks(self) -> tuple[RecallScore, ...]:
        """Of the documents of tasks."""
        return tuple(score for score in self.recall if score.kind in TASKS)

    @property
    def num_found_of_exact(self) -> int:
        """Needles."""
        return sum(score.num_found_of_exact for score in self.needles)

    @property
    def num_found_by_exact(self) -> int:
        """Needles."""
        return sum(score.num_found_by_exact for score in self.needles)

    @property
    def recall_share(self) -> float | None:
        """Of the needles that the exact cache finds. None: it finds none."""
        if not self.num_found_by_exact:
            return None
        return self.num_found_of_exact / self.num_found_by_exact


class SweepReport(msgspec.Struct, frozen=True, kw_only=True):
    """All policies measured so far, in the order of measuring."""

    subject: SweepSubject
    scores: tuple[RecipeScore, ...] = ()

    def has(self, policy: str) -> bool:
        return any(score.policy == policy for score in self.scores)

    def with_score(self, score: RecipeScore) -> "SweepReport":
        return SweepReport(subject=self.subject, scores=(*self.scores, score))


def scored_document(document: NeedleDocument) -> ScoredText:
    """The document's name, and a digest of its tokens and of where its answers stand."""
    answers = [(question.answer_from, question.answer_to) for question in document.questions]
    content = msgspec.json.encode((document.token_ids, answers))
    return ScoredText(
        name=document.name, digest=hashlib.blake2b(content, digest_size=8).hexdigest()
    )


def write_report(path: Path, report: SweepReport) -> None:
    """Replace the file once the new one is whole. Raises: OSError."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def replace_file(path: Path, content: bytes) -> None:
    """So that whoever reads it finds the old content or the new one, whole. Raises: OSError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_report(path: Path) -> SweepReport:
    """Raises: ConfigError when the file cannot be read or is no report."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SweepReport)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no report of a sweep: {error}") from error


def _mean(means: list[Mean]) -> Mean | None:
    if not means:
        return None
    errors = [mean.standard_error for mean in means]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(means) if len(known) == len(errors) else None
    return Mean(value=sum(mean.value for mean in means) / len(means), standard_error=error)
