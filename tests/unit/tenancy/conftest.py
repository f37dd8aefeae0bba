"""A store in a file of its own, with a clock that a test moves."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from tests.unit.tenancy.acting import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.sqlite"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[SqliteTenantStore]:
    store = SqliteTenantStore(path, unix_time=clock, busy_timeout_s=0.2)
    yield store
    store.close()
