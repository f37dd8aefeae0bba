"""A measurement of quality spread over processes of one machine.

Each loads the model for itself and takes one text or document of one policy at a time. Policies
that are read in small steps leave a GPU waiting for the process that asks for them: on an H100 ten
of them did in a minute what takes one five.
"""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kvcluster.bench.quality import Prepared, prepare
from kvcluster.bench.quality_settings import Progress, QualitySettings, kept_report
from kvcluster.errors import ConfigError, KvClusterError
from kvcluster.quality.measure import (
    ExactDocument,
    ExactText,
    device_name,
    exact_document,
    exact_text,
    recall_score,
    text_score,
)
from kvcluster.quality.records import RecallScore, TextScore
from kvcluster.quality.sweep import sweep_subject
from kvcluster.quality.sweep_records import CalibratedOn, RecipeScore, SweepReport, SweepSubject

_Score = TextScore | RecallScore


class _Plan(NamedTuple):
    """What one of the processes found when it had read everything."""

    subject: SweepSubject
    policies: tuple[tuple[str, bool], ...]
    """Canonical text, and whether it needs a calibration."""
    calibrated_on: CalibratedOn | None
    device: str


class _Item(NamedTuple):
    """A text or a document, by its place among those of its kind."""

    is_document: bool
    place: int


class _Scored(NamedTuple):
    score: _Score
    seconds: float


def measure_in_processes(settings: QualitySettings, progress: Progress) -> SweepReport:
    """As `quality.measure_quality` without a cluster; `seconds` of a score are those of all
    processes.

    Raises: as that, and ConfigError where a process runs out of the device's memory, or ends.
    """
    pool = ProcessPoolExecutor(
        settings.num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(settings,),
    )
    try:
        with pool:
            return _measure(pool, settings, progress)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"quality: one of {settings.num_processes} processes ended, maybe for want of memory: "
            "take fewer --processes"
        ) from error


def _measure(
    pool: ProcessPoolExecutor, settings: QualitySettings, progress: Progress
) -> SweepReport:
    plan = pool.submit(_plan).result()
    report, keep = kept_report(settings, plan.subject, progress)
    items = [_Item(is_document=False, place=place) for place in range(len(plan.subject.texts))]
    items += [_Item(is_document=True, place=place) for place in range(len(plan.subject.documents))]
    # All are asked for at once, so that no process waits for the last one of a policy.
    asked: list[tuple[int, list[Future[_Scored]]]] = [
        (place, [pool.submit(_score, place, item) for item in items])
        for place, (name, _) in enumerate(plan.policies)
        if not report.has(name)
    ]
    try:
        for place, futures in asked:
            name, needs_calibration = plan.policies[place]
            found = [future.result() for future in futures]
            report = report.with_score(
                RecipeScore(
                    policy=name,
                    device=plan.device,
                    seconds=sum(each.seconds for each in found),
                    texts=tuple(_texts(found)),
                    recall=tuple(
                        each.score for each in found if isinstance(each.score, RecallScore)
                    ),
                    calibrated_on=plan.calibrated_on if needs_calibration else None,
                )
            )
            keep(report)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return report


def _texts(found: list[_Scored]) -> Iterator[TextScore]:
    return (each.score for each in found if isinstance(each.score, TextScore))


class _Reader:
    """One process's model, and what the exact cache made of the texts that it has met."""

    def __init__(self, settings: QualitySettings) -> None:
        self.settings = settings
        self.read: Prepared = prepare(settings)
        self._texts: dict[int, ExactText] = {}
        self._documents: dict[int, ExactDocument] = {}

    def score(self, policy: int, item: _Item) -> _Score:
        model, measured = self.read.model, self.read.policies[policy].measured
        place = item.place
        if item.is_document:
            if place not in self._documents:
                document = self.read.corpus.documents[place]
                self._documents[place] = exact_document(model, document)
            return recall_score(model, measured, self._documents[place])
        if place not in self._texts:
            text, token_ids_T = self.read.corpus.texts[place]
            self._texts[place] = exact_text(
                model, text, token_ids_T, first_scored=self.settings.first_scored
            )
        return text_score(model, measured, self._texts[place])


_readers: list[_Reader | KvClusterError] = []
"""Of this process: the only one, or why there is none."""


def _start(settings: QualitySettings) -> None:
    # An error here would end the pool without a word of what it was.
    try:
        with _memory_of(settings):
            _readers.append(_Reader(settings))
    except KvClusterError as error:
        _readers.append(error)


@contextmanager
def _memory_of(settings: QualitySettings) -> Iterator[None]:
    """Raises: ConfigError where what runs inside is left without memory of the device."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"quality: {settings.device} has too little memory for {settings.num_processes} "
            "processes beside each other: take fewer --processes"
        ) from error


def _reader() -> _Reader:
    [found] = _readers
    if isinstance(found, KvClusterError):
        raise found
    return found


def _plan() -> _Plan:
    reader = _reader()
    settings, read = reader.settings, reader.read
    try:
        subject = sweep_subject(
            read.model.spec,
            read.corpus.texts,
            read.corpus.documents,
            block_size=settings.block_size,
            exact_recent_tokens=settings.exact_recent_tokens,
            first_scored=settings.first_scored,
        )
    except ValueError as error:
        raise ConfigError(f"quality: {error}") from error
    return _Plan(
        subject,
        tuple((policy.name, policy.needs_calibration) for policy in read.policies),
        read.calibrated_on,
        device_name(read.model.device),
    )


def _score(policy: int, item: _Item) -> _Scored:
    started = time.monotonic()
    reader = _reader()
    with _memory_of(reader.settings):
        score = reader.score(policy, item)
    return _Scored(score, time.monotonic() - started)
