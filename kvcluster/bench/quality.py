"""`kvcluster bench quality`: what policies of compression cost a model, beside the exact cache.

    python -m kvcluster.bench.quality --model smollm2-135m --policy int4 --policy "int8 + window"

Perplexity, KL divergence and agreement on the evaluation texts, recall over documents with needles,
and bytes. With `--output`, a run that was cut off goes on where it was.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from kvcluster.config import CacheConfig
from kvcluster.errors import ConfigError, KvClusterError
from kvcluster.model.codecs import calibration_for
from kvcluster.model.loader import LoadedModel, load_model
from kvcluster.model.tokenizer import TextTokenizer, load_tokenizer
from kvcluster.policy import parse_policy
from kvcluster.quality.held_out import evaluation_documents, reported_texts
from kvcluster.quality.measure import FIRST_SCORED, text_tokens
from kvcluster.quality.served import MENU, codecs_of, recent_exact, served_policies
from kvcluster.quality.spans import Mean
from kvcluster.quality.sweep import ReadOnce, earlier_report, keep_in, read_once, sweep
from kvcluster.quality.sweep_records import CalibratedOn, RecipeScore, SweepReport
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


def measure_quality(settings: QualitySettings, progress: Progress) -> SweepReport:
    """Measure all policies of the settings. Takes minutes to hours on a CPU; blocks.

    Raises: InvalidField, ConfigError, ModelNotFound, ModelUnsupported.
    """
    for policy in settings.policies:
        parse_policy(policy, MENU)
    kept_exact = recent_exact(settings.block_size, settings.exact_recent_tokens)
    texts = _chosen(_texts(settings.texts_file), settings.text_names)
    model = load_model(settings.model, dtype=settings.dtype, device=settings.device)
    tokenizer = load_tokenizer(settings.model)
    if tokenizer is None:
        raise ConfigError(f"model {settings.model} has no tokenizer to read texts with")
    calibration = None
    if settings.calibration is not None:
        calibration = calibration_for(model.spec, str(settings.calibration))
    codecs = codecs_of(model, calibration)
    policies = served_policies(settings.policies, codecs, model.spec, kept_exact)
    started = time.monotonic()
    exact = _read_once(settings, model, tokenizer, texts)
    progress(f"exact cache: {time.monotonic() - started:.1f} s")
    report = SweepReport(subject=exact.subject)
    keep = _announcing(progress, len(policies))
    if settings.output is not None:
        report = earlier_report(settings.output, exact.subject)
        keep = _both(keep_in(settings.output), keep)
    calibrated_on = CalibratedOn.of(calibration)
    return sweep(model, exact, policies, report, keep=keep, calibrated_on=calibrated_on)


def summary(score: RecipeScore) -> str:
    """One line."""
    parts = [score.policy]
    if (increase := score.perplexity_increase_percent) is not None:
        parts.append(f"perplexity {with_error(increase)} %")
    if (kl := score.kl) is not None:
        parts.append(f"KL {kl.value:.4f}")
    if (agreement := score.top1_agreement) is not None:
        parts.append(f"top-1 {100 * agreement.value:.1f} %")
    if score.recall:
        parts.append(f"needles {score.num_found_of_exact}/{score.num_found_by_exact}")
    parts.append(f"{score.storage.bytes_per_token:,.0f} bytes/token, {score.storage.ratio:.2f}x")
    return f"{', '.join(parts)} ({score.seconds:.1f} s)"


def with_error(mean: Mean) -> str:
    """A signed value, with its standard error where there is one."""
    error = "" if mean.standard_error is None else f" ± {mean.standard_error:.2f}"
    return f"{mean.value:+.2f}{error}"


def write_texts(path: Path) -> None:
    """Write the texts of the installed packages, for machines that have others."""
    path.write_bytes(msgspec.json.encode(load_texts()))


def _texts(path: Path | None) -> tuple[Text, ...]:
    if path is None:
        return load_texts()
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Text, ...])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--texts: {path} cannot be read: {error}") from error


def _chosen(texts: Sequence[Text], names: Sequence[str]) -> list[Text]:
    if not names:
        return reported_texts(texts)
    offered = {text.name: text for text in texts if text.purpose is Purpose.EVALUATION}
    for name in names:
        if name not in offered:
            raise ConfigError(f"--text: no evaluation text {name!r}; there are {[*offered]}")
    return [offered[name] for name in names]


def _read_once(
    settings: QualitySettings, model: LoadedModel, tokenizer: TextTokenizer, texts: Sequence[Text]
) -> ReadOnce:
    length = settings.num_tokens or model.spec.max_context_tokens
    try:
        return read_once(
            model,
            [(text, text_tokens(tokenizer, text, length)) for text in texts],
            evaluation_documents(
                tokenizer,
                texts,
                lengths=settings.lengths or _lengths(length),
                seeds=range(settings.num_seeds),
                num_needles=settings.num_needles,
            ),
            block_size=settings.block_size,
            exact_recent_tokens=settings.exact_recent_tokens,
            first_scored=settings.first_scored,
        )
    except ValueError as error:
        raise ConfigError(f"quality: {error}") from error


def _lengths(longest: int) -> list[int]:
    lengths = [longest // share for share in _LENGTH_SHARES]
    return [length for length in lengths if length >= _SHORTEST_DOCUMENT] or [longest]


def _announcing(progress: Progress, num_policies: int) -> Callable[[SweepReport], None]:
    return lambda report: progress(
        f"[{len(report.scores)}/{num_policies}] {summary(report.scores[-1])}"
    )


def _both(
    first: Callable[[SweepReport], None], second: Callable[[SweepReport], None]
) -> Callable[[SweepReport], None]:
    def keep(report: SweepReport) -> None:
        first(report)
        second(report)

    return keep


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvcluster.bench.quality", description="Measure what compression costs."
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--policy", action="append", default=[], help="may be given many times")
    parser.add_argument("--policies", type=Path, help="a file with one policy a line")
    parser.add_argument("--tokens", type=int, help="of each text; default: all the model reads")
    parser.add_argument("--text", action="append", default=[], help="an evaluation text's name")
    parser.add_argument("--texts", type=Path, help="file that --write-texts wrote")
    parser.add_argument("--length", action="append", type=int, default=[], help="of documents")
    parser.add_argument("--seeds", type=int, default=2, help="documents of a style and length")
    parser.add_argument("--needles", type=int, default=8, help="of a document")
    parser.add_argument("--calibration", type=Path, help="that calibrate wrote")
    parser.add_argument("--output", type=Path, help="report; continued if it is there")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    cache = CacheConfig()
    parser.add_argument("--block-size", type=int, default=cache.block_size)
    parser.add_argument(
        "--exact-recent", type=int, default=cache.exact_recent_tokens, help="tokens read exact"
    )
    parser.add_argument("--first-scored", type=int, default=FIRST_SCORED)
    parser.add_argument("--json", action="store_true", help="the report on stdout")
    parser.add_argument("--write-texts", type=Path, help="write the texts there, and end")
    return parser


def _settings(given: argparse.Namespace) -> QualitySettings:
    listed: list[str] = []
    if given.policies is not None:
        try:
            lines = given.policies.read_text("utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"--policies: {error}") from error
        listed = [line for line in lines if line.strip() and not line.startswith("#")]
    if not given.model or not given.policy + listed:
        raise ConfigError("quality: want --model, and --policy or --policies")
    return QualitySettings(
        model=given.model,
        policies=(*given.policy, *listed),
        num_tokens=given.tokens,
        text_names=tuple(given.text),
        texts_file=given.texts,
        lengths=tuple(given.length),
        num_seeds=given.seeds,
        num_needles=given.needles,
        calibration=given.calibration,
        output=given.output,
        device=given.device,
        dtype=given.dtype,
        block_size=given.block_size,
        exact_recent_tokens=given.exact_recent,
        first_scored=given.first_scored,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for a wrong setting."""
    given = _parser().parse_args(arguments)
    try:
        if given.write_texts is not None:
            write_texts(given.write_texts)
            return
        report = measure_quality(_settings(given), _to_stderr)
    except KvClusterError as error:
        _to_stderr(f"quality: {error.message}")
        raise SystemExit(2) from error
    if given.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
