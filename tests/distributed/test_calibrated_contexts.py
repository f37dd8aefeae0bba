"""A context on disk whose codec was fitted is read with that calibration, and with no other."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvcluster.config import ClusterConfig, RingConfig, SpillConfig
from kvcluster.engine.api import GenerationRequest, Output
from kvcluster.engine.context_api import ContextChange, ContextState
from kvcluster.engine.service import EngineService
from kvcluster.errors import ContextNotReady
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibration_run import CalibrationReport, CalibrationSettings, calibrate
from kvcluster.tenancy.limits import NO_LIMITS
from kvcluster.types import DEFAULT_TENANT
from tests.distributed.stored_contexts import files_in, finished
from tests.distributed.test_calibration_file import CACHE, TEXTS, config, model, path, report
from tests.thread_executor import hear, running_engine
from tests.unit.quality.toys import character_tokenizer

__all__ = ["model", "path", "report"]

POLICY = "latent:r=0.5,bits=8"
BOOK, QUESTION = list(range(3, 163)), [5, 6, 7]


@pytest.fixture(scope="module")
def other_path(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration on another text."""
    out = tmp_path_factory.mktemp("other") / "tiny.safetensors"
    settings = CalibrationSettings(
        out=out,
        policies=(POLICY,),
        num_documents=0,
        block_size=CACHE.block_size,
        exact_recent_tokens=CACHE.exact_recent_tokens,
    )
    contents = ["Other words, in another order, over and over again. " * 40]
    calibrate(
        model,
        character_tokenizer(),
        TEXTS,
        settings,
        lambda _stage, _done, _total: None,
        contents=contents,
    )
    return out


def stored(calibration: Path | None, folder: Path, num_ranks: int = 2) -> ClusterConfig:
    base = config(calibration or Path())
    return replace(
        base,
        calibration="" if calibration is None else str(calibration),
        ring=RingConfig(num_ranks=num_ranks),
        spill=SpillConfig(folder=str(folder)),
    )


async def answer(service: EngineService, prompt: list[int], **fields: str) -> list[int]:
    request = GenerationRequest(model="toy", max_output_tokens=8, **fields)
    heard = await hear(service, await service.open(request), prompt)
    return [id_ for event in heard if isinstance(event, Output) for id_ in event.token_ids]


async def test_latents_on_disk_are_read_with_the_calibration_that_wrote_them_alone(
    model: LoadedModel, path: Path, report: CalibrationReport, other_path: Path, tmp_path: Path
) -> None:
    async with running_engine(model, stored(path, tmp_path, 3)) as (service, _):
        await finished(service, BOOK, "book", policy=POLICY, durable=True)
    async with running_engine(model, stored(other_path, tmp_path)) as (service, _):
        with pytest.raises(ContextNotReady, match="was saved with another calibration"):
            await answer(service, QUESTION, context="book")
    async with running_engine(model, stored(None, tmp_path)) as (service, _):
        without = await service.get_context(DEFAULT_TENANT, "book")
        pin = ContextChange(pinned=True)
        await service.update_context(DEFAULT_TENANT, "book", pin, etag="", limits=NO_LIMITS)
        with pytest.raises(ContextNotReady, match="calibrat"):
            await answer(service, QUESTION, context="book")
    async with running_engine(model, stored(path, tmp_path)) as (service, _):
        found = await answer(service, QUESTION, context="book")
        expected = await answer(service, [*BOOK, *QUESTION], policy=POLICY)

    async with running_engine(model, stored(None, tmp_path)) as (service, _):
        await service.delete_context(DEFAULT_TENANT, "book", "")

    assert files_in(tmp_path) == []
    assert without.state is ContextState.FAILED
    assert found == expected
