"""A process that is left without memory ends the measurement with what to do about it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import torch

from kvcluster.bench import quality_processes
from kvcluster.bench.quality import measure_quality
from kvcluster.bench.quality_settings import QualitySettings
from kvcluster.errors import ConfigError
from kvcluster.quality.texts import Purpose, Text
from tests.model_directory import write_tiny_model

TEXT = Text(name="judged", purpose=Purpose.EVALUATION, content="Some words, and then some. " * 40)
TOO_LITTLE = "cpu has too little memory for 3 processes beside each other: take fewer --processes"


class OneThread(ThreadPoolExecutor):
    """In place of the processes, so that what they call can be replaced."""

    def __init__(
        self, _num: int, *, mp_context: object, initializer: Callable[..., None], initargs: Any
    ) -> None:
        super().__init__(1, initializer=initializer, initargs=initargs)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QualitySettings:
    monkeypatch.setattr(quality_processes, "ProcessPoolExecutor", OneThread)
    monkeypatch.setattr(quality_processes, "_readers", [])
    write_tiny_model(tmp_path)
    texts = tmp_path / "texts.json"
    texts.write_bytes(msgspec.json.encode([TEXT]))
    return QualitySettings(
        model=str(tmp_path),
        policies=("int4", "int8"),
        num_tokens=200,
        texts_file=texts,
        num_seeds=0,
        output=tmp_path / "report.json",
        first_scored=100,
        block_size=16,
        exact_recent_tokens=32,
        num_processes=3,
    )


def without_memory(*_given: object, **_named: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def ignore(_line: str) -> None: ...


def test_nothing_is_wrong_where_there_is_memory(settings: QualitySettings) -> None:
    report = measure_quality(settings, ignore)

    assert [score.policy for score in report.scores] == ["int4", "int8"]


@pytest.mark.parametrize("what", ["prepare", "exact_text", "text_score"])
def test_too_little_memory_says_to_take_fewer_processes(
    settings: QualitySettings, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(quality_processes, what, without_memory)

    with pytest.raises(ConfigError, match=TOO_LITTLE):
        measure_quality(settings, ignore)


def test_another_error_of_a_process_stays_what_it_is(
    settings: QualitySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_given: object, **_named: object) -> NoReturn:
        raise RuntimeError("a bug")

    monkeypatch.setattr(quality_processes, "text_score", broken)

    with pytest.raises(RuntimeError, match="a bug"):
        measure_quality(settings, ignore)
