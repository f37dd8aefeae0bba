"""`kvcluster bench quality`: what policies of compression cost a model, beside the exact cache.

    python -m kvcluster.bench.quality --model smollm2-135m --policy int4 --policy "int8 + window"

Perplexity, KL divergence and agreement on the evaluation texts, recall over documents with needles,
and bytes: in one pass over each text, or with `--ranks` through a cluster as it serves. With
`--output`, a run that was cut off goes on where it was.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvcluster.bench.quality_settings import (
    Corpus,
    Progress,
    QualitySettings,
    kept_report,
    read_corpus,
)
from kvcluster.config import CacheConfig
from kvcluster.errors import ConfigError, KvClusterError
from kvcluster.model.codecs import calibration_for
from kvcluster.model.loader import LoadedModel, load_model
from kvcluster.policy import parse_policy
from kvcluster.quality.measure import FIRST_SCORED
from kvcluster.quality.served import (
    MENU,
    ServedPolicy,
    codecs_of,
    recent_exact,
    served_policies,
)
from kvcluster.quality.sweep import ReadOnce, read_once, sweep
from kvcluster.quality.sweep_records import CalibratedOn, SweepReport
from kvcluster.quality.texts import load_texts


def measure_quality(settings: QualitySettings, progress: Progress) -> SweepReport:
    """Measure all policies of the settings. Takes minutes to hours on a CPU; blocks.

    Raises: InvalidField, ConfigError, ModelNotFound, ModelUnsupported.
    """
    for policy in settings.policies:
        parse_policy(policy, MENU)
    if settings.num_ranks:
        # Ray takes seconds to import, and one pass does without.
        from kvcluster.bench.engine_quality import measure_served

        return measure_served(settings, progress)
    if settings.num_processes > 1:
        from kvcluster.bench.quality_processes import measure_in_processes

        return measure_in_processes(settings, progress)
    read = prepare(settings)
    started = time.monotonic()
    exact = _read_once(settings, read.model, read.corpus)
    progress(f"exact cache: {time.monotonic() - started:.1f} s")
    report, keep = kept_report(settings, exact.subject, progress)
    return sweep(
        read.model, exact, read.policies, report, keep=keep, calibrated_on=read.calibrated_on
    )


def write_texts(path: Path) -> None:
    """Write the texts of the installed packages, for machines that have others."""
    path.write_bytes(msgspec.json.encode(load_texts()))


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What a measurement without a cluster begins with."""

    model: LoadedModel
    corpus: Corpus
    policies: Sequence[ServedPolicy]
    calibrated_on: CalibratedOn | None


def prepare(settings: QualitySettings) -> Prepared:
    """Raises: as `measure_quality`."""
    kept_exact = recent_exact(settings.block_size, settings.exact_recent_tokens)
    model = load_model(settings.model, dtype=settings.dtype, device=settings.device)
    corpus = read_corpus(settings, model.spec.max_context_tokens)
    calibration = None
    if settings.calibration is not None:
        calibration = calibration_for(model.spec, str(settings.calibration))
    codecs = codecs_of(model, calibration)
    policies = served_policies(settings.policies, codecs, model.spec, kept_exact)
    return Prepared(model, corpus, policies, CalibratedOn.of(calibration))


def _read_once(settings: QualitySettings, model: LoadedModel, corpus: Corpus) -> ReadOnce:
    try:
        return read_once(
            model,
            corpus.texts,
            corpus.documents,
            block_size=settings.block_size,
            exact_recent_tokens=settings.exact_recent_tokens,
            first_scored=settings.first_scored,
        )
    except ValueError as error:
        raise ConfigError(f"quality: {error}") from error


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
    parser.add_argument("--tasks", type=int, default=0, help="documents of each task")
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
    parser.add_argument("--ranks", type=int, default=0, help="measure through a cluster of so many")
    parser.add_argument(
        "--processes", type=int, default=1, help="that measure beside each other on the device"
    )
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
        num_task_seeds=given.tasks,
        calibration=given.calibration,
        output=given.output,
        device=given.device,
        dtype=given.dtype,
        block_size=given.block_size,
        exact_recent_tokens=given.exact_recent,
        first_scored=given.first_scored,
        num_ranks=given.ranks,
        num_processes=given.processes,
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
