"""Real models for the tests of this layer. The first use converts them, once for a machine."""

import pytest

from kvcluster.errors import ModelNotFound
from kvcluster.model.loader import LoadedModel, load_model
from kvcluster.model.source import ModelFiles, find_model


@pytest.fixture(scope="session")
def smollm2_files() -> ModelFiles:
    return _files("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_files() -> ModelFiles:
    return _files("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2(smollm2_files: ModelFiles) -> LoadedModel:
    return load_model("smollm2-135m", dtype="auto", device="cpu")


def _files(name: str) -> ModelFiles:
    try:
        return find_model(name)
    except ModelNotFound as missing:
        pytest.skip(missing.message)
