"""The `kvcluster` command as a process of its own, and a router on a real port for it to call."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcluster.config import RouterConfig
from kvcluster.engine.api import GenerationRequest, Opened
from kvcluster.router.server import RouterServer
from tests.unit.router.fake_backend import FakeBackend

COMMAND = Path(sys.executable).with_name("kvcluster")


class WatchedBackend(FakeBackend):
    """Tells when the first generation has been opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = asyncio.Event()

    async def open(self, request: GenerationRequest) -> Opened:
        opened = await super().open(request)
        self.opened.set()
        return opened


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
async def backend() -> WatchedBackend:
    return WatchedBackend()


@pytest.fixture
async def server(backend: FakeBackend) -> AsyncIterator[str]:
    config = RouterConfig(listen="127.0.0.1:0", insecure_local=True)
    router = RouterServer([backend], config, health_interval_s=0.02)
    await router.start()
    yield router.address
    await router.stop(grace_s=0)


async def started(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        COMMAND, *arguments, stdin=pipe, stdout=pipe, stderr=pipe
    )


async def ended(command: asyncio.subprocess.Process, stdin: str = "") -> Ended:
    stdout, stderr = await command.communicate(stdin.encode())
    assert command.returncode is not None
    return Ended(code=command.returncode, stdout=stdout.decode(), stderr=stderr.decode())


async def run(*arguments: str, stdin: str = "") -> Ended:
    return await ended(await started(*arguments), stdin)
