"""What a measurement of quality is told, and what it reads: texts and documents with needles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from torch import Tensor

from kvcluster.config import CacheConfig
from kvcluster.errors import ConfigError
from kvcluster.model.tokenizer import load_tokenizer
from kvcluster.quality.held_out import evaluation_documents, reported_texts, task_documents
from kvcluster.quality.measure import FIRST_SCORED, text_tokens
from kvcluster.quality.needles import NeedleDocument
from kvcluster.quality.records import RecallScore
from kvcluster.quality.spans import Mean
from kvcluster.quality.sweep import earlier_report, keep_in
from kvcluster.quality.sweep_records import RecipeScore, SweepReport, SweepSubject
from kvcluster.quality.texts import Purpose, Text, load_texts

Progress = Callable[[str], None]
"""Called with one line when something is done."""

_LENGTH_SHARES: Final = (8, 4, 2, 1)
"""Documents have the length of the texts divided by each of these."""
_SHORTEST_DOCUMENT: Final = 1024
"""Needles and questions alone take about half of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualitySettings:
    """What to measure. The defaults measure all there is, at the model's full length."""

    model: str
    """Short name, directory or GGUF file."""
    policies: tuple[str, ...]
    """In the policy language: see `kvcluster.policy`."""
    num_tokens: int | None = None
    """Of each text; None: as many as the model can read."""
    text_names: tuple[str, ...] = ()
    """Evaluation texts to measure on; empty: all that no recipe was chosen on."""
    texts_file: Path | None = None
    """Texts that `--write-texts` wrote, instead of those of the installed packages."""
    lengths: tuple[int, ...] = ()
    """Of the documents with needles, in tokens; empty: from an eighth of the texts' length, but at
    least 1024 tokens, up to it."""
    num_seeds: int = 2
    """Documents of each style and length; 0: none."""
    num_needles: int = 8
    num_task_seeds: int = 0
    """Documents of each task of `kvcluster.quality.tasks`, as long as the texts."""
    calibration: Path | None = None
    """What `kvcluster calibrate` wrote, for latents."""
    output: Path | None = None
    """The report, rewritten after every policy."""
    device: str = "cpu"
    dtype: str = "float32"
    block_size: int = CacheConfig().block_size
    exact_recent_tokens: int = CacheConfig().exact_recent_tokens
    """Latest tokens that are read exact, rounded up to whole blocks."""
    first_scored: int = FIRST_SCORED
    num_ranks: int = 0
    """Of a cluster that is started for the measurement and reads as it serves; 0: one pass over
    each text, without a cluster."""
    num_processes: int = 1
    """Without a cluster: processes that each take one text or document of one policy at a time. A
    GPU waits for one alone where policies are read in small steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What policies are measured on."""

    texts: tuple[tuple[Text, Tensor], ...]
    """With their token ids, all of one length."""
    documents: tuple[NeedleDocument, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest text or document."""
        lengths = [len(ids_T) for _, ids_T in self.texts]
        return max([*lengths, *(len(document.token_ids) for document in self.documents)])


def chosen_texts(settings: QualitySettings) -> list[Text]:
    """Raises: ConfigError for a file that cannot be read, or a text that is not there."""
    texts, names = _texts(settings.texts_file), settings.text_names
    if not names:
        return reported_texts(texts)
    offered = {text.name: text for text in texts if text.purpose is Purpose.EVALUATION}
    for name in names:
        if name not in offered:
            raise ConfigError(f"--text: no evaluation text {name!r}; there are {[*offered]}")
    return [offered[name] for name in names]


def read_corpus(settings: QualitySettings, longest: int) -> Corpus:
    """The texts and documents of the settings, or of `longest` tokens where they name no length.

    Raises: ConfigError, for texts that are too short too.
    """
    texts = chosen_texts(settings)
    tokenizer = load_tokenizer(settings.model)
    if tokenizer is None:
        raise ConfigError(f"model {settings.model} has no tokenizer to read texts with")
    length = settings.num_tokens or longest
    try:
        documents = evaluation_documents(
            tokenizer,
            texts,
            lengths=settings.lengths or _lengths(length),
            seeds=range(settings.num_seeds),
            num_needles=settings.num_needles,
        )
        documents += task_documents(
            tokenizer, texts, num_tokens=length, seeds=range(settings.num_task_seeds)
        )
        return Corpus(
            texts=tuple((text, text_tokens(tokenizer, text, length)) for text in texts),
            documents=tuple(documents),
        )
    except ValueError as error:
        raise ConfigError(f"quality: {error}") from error


def kept_report(
    settings: QualitySettings, subject: SweepSubject, progress: Progress
) -> tuple[SweepReport, Callable[[SweepReport], None]]:
    """The report to go on with, and what is to be called with it after each policy.

    Raises: ConfigError when the file holds another measurement.
    """
    num_policies = len(settings.policies)

    def announce(report: SweepReport) -> None:
        progress(f"[{len(report.scores)}/{num_policies}] {summary(report.scores[-1])}")

    if settings.output is None:
        return SweepReport(subject=subject), announce
    write = keep_in(settings.output)

    def keep(report: SweepReport) -> None:
        write(report)
        announce(report)

    return earlier_report(settings.output, subject), keep


def summary(score: RecipeScore) -> str:
    """One line."""
    parts = [score.policy]
    if (increase := score.perplexity_increase_percent) is not None:
        parts.append(f"perplexity {with_error(increase)} %")
    if (kl := score.kl) is not None:
        parts.append(f"KL {kl.value:.4f}")
    if (agreement := score.top1_agreement) is not None:
        parts.append(f"top-1 {100 * agreement.value:.1f} %")
    if score.needles:
        parts.append(f"needles {score.num_found_of_exact}/{score.num_found_by_exact}")
    if score.tasks:
        parts.append(f"tasks {found_of_exact(score.tasks)}")
    parts.append(f"{score.storage.bytes_per_token:,.0f} bytes/token, {score.storage.ratio:.2f}x")
    return f"{', '.join(parts)} ({score.seconds:.1f} s)"


def found_of_exact(scores: Sequence[RecallScore]) -> str:
    """Answers that the policy finds, of those that the exact cache finds: 7/9."""
    of_exact = sum(score.num_found_of_exact for score in scores)
    return f"{of_exact}/{sum(score.num_found_by_exact for score in scores)}"


def with_error(mean: Mean) -> str:
    """A signed value, with its standard error where there is one."""
    error = "" if mean.standard_error is None else f" ± {mean.standard_error:.2f}"
    return f"{mean.value:+.2f}{error}"


def _texts(path: Path | None) -> tuple[Text, ...]:
    if path is None:
        return load_texts()
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Text, ...])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--texts: {path} cannot be read: {error}") from error


def _lengths(longest: int) -> list[int]:
    lengths = [longest // share for share in _LENGTH_SHARES]
    return [length for length in lengths if length >= _SHORTEST_DOCUMENT] or [longest]
