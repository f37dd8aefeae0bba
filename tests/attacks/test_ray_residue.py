"""What `test_residue` looks for in one process, in every process, file and shared memory of a
server on a Ray cluster of two nodes: while a context is in three tiers, and after its end."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kvcluster.client import Client
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.tenancy.limits import Tier
from tests.architectures import tiny_models
from tests.attacks.residue import canaries_of, found_in_files, found_in_process, random_ids
from tests.e2e.test_ray_cluster import ray_nodes

pytestmark = [
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="searches /proc"),
]
MEMORY = Path("/dev/shm")
NUM_RANKS = 3
CONFIG = ClusterConfig(
    model="tiny",
    cache=CacheConfig(block_size=16, capacity_tokens=2048, exact_recent_tokens=20),
    engine=EngineConfig(prefill_chunk_tokens=64, shard_min_tokens=32),
    ring=RingConfig(num_ranks=NUM_RANKS),
)
SETTINGS = (
    *("cache.block_size=16", "cache.capacity_tokens=2048", "cache.exact_recent_tokens=20"),
    *("engine.prefill_chunk_tokens=64", "engine.shard_min_tokens=32", "ring.placement=SPREAD"),
    f"spill.host_capacity_bytes={1 << 26}",
)
FORGETS_TO_ZERO = """
import sys
from importlib.machinery import PathFinder

class Faulty:
    def find_spec(name, path=None, target=None):
        if name != "kvcluster.cache.zeroed_blocks":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def run_and_break(module):
            run(module)
            module.zero_blocks = lambda *_: None
        spec.loader.exec_module = run_and_break
        return spec

sys.meta_path.insert(0, Faulty)
"""
"""As `sitecustomize` of every process: ranks free blocks as they are."""


@dataclass(frozen=True)
class Searched:
    """A running server, and where it may leave something."""

    address: str
    process: "subprocess.Popen[str]"
    nodes: psutil.Process
    folders: tuple[Path, ...]
    """Of contexts, and what Ray writes."""

    def processes(self) -> dict[psutil.Process, str]:
        """Of the server and of Ray, with their titles."""
        found = {}
        for process in (psutil.Process(self.process.pid), *_family(self.nodes)):
            with suppress(psutil.NoSuchProcess):
                found[process] = " ".join(process.cmdline())
        return found

    def held(self, canaries: Mapping[str, bytes]) -> dict[str, set[str]]:
        """By title of a process, the canaries in it."""
        held: dict[str, set[str]] = {}
        for process, title in self.processes().items():
            # Ray's own workers come and go.
            with suppress(ProcessLookupError, FileNotFoundError):
                counts = found_in_process(process.pid, canaries)
                held.setdefault(title, set()).update(name for name in counts if counts[name])
        return held

    def in_files(self, canaries: Mapping[str, bytes]) -> dict[str, int]:
        counts = found_in_files([*self.folders, MEMORY], canaries)
        return {name: count for name, count in counts.items() if count}

    def kill(self) -> None:
        """Every process, at once."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _ray_sessions(nodes: psutil.Process) -> set[Path]:
    """Where Ray's processes say that they write."""
    titles = " ".join(word for process in _family(nodes) for word in process.cmdline())
    sessions = {Path(found) for found in re.findall(r"/[^ =,:]*/session_[^/ ,:]+", titles)}
    assert sessions
    return sessions


@contextmanager
def serving(folder: Path) -> Iterator[Searched]:
    contexts, memory = folder / "contexts", MEMORY / f"test-{os.getpid()}-{folder.name}"
    contexts.mkdir()
    memory.mkdir()
    tiny_models()["llama"]().save_pretrained(folder / "tiny")
    try:
        with ray_nodes() as (ray_address, nodes):
            stores = (f"spill.folder={contexts}", f"spill.host_folder={memory}")
            command = [
                *(Path(sys.executable).with_name("kvcluster"), "serve", "--json"),
                *("--insecure-local", "--listen", "127.0.0.1:0", "--ray-address", ray_address),
                *("--model", folder / "tiny", "--ranks", str(NUM_RANKS)),
                *(part for setting in (*SETTINGS, *stores) for part in ("--set", setting)),
            ]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                try:
                    assert process.stdout is not None
                    first_line = process.stdout.readline()
                    assert first_line, f"exit code {process.wait(30)}"
                    address, folders = json.loads(first_line)["listen"], _ray_sessions(nodes)
                    yield Searched(address, process, nodes, (contexts, *folders))
                finally:
                    process.kill()
    finally:
        shutil.rmtree(memory)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    """For both tests without a fault: the last one kills it."""
    with serving(tmp_path_factory.mktemp("served")) as served:
        yield served


async def telling_canaries(searched: Searched, ids: list[int]) -> dict[str, bytes]:
    """Bytes that are there before the prompt is sent tell nothing."""
    canaries = await canaries_of(ids, CONFIG)
    known = set().union(*searched.held(canaries).values())
    return {name: canary for name, canary in canaries.items() if name not in known}


def ranks_in(names: Iterable[str]) -> set[str]:
    """Whose cache it is."""
    return {name.split(",")[0] for name in names if name.startswith("cache")}


def ranks_in_all(held: Mapping[str, set[str]]) -> set[str]:
    return ranks_in(name for names in held.values() for name in names)


ALL_RANKS = {f"cache of rank {rank}" for rank in range(NUM_RANKS)}


async def test_a_context_in_three_tiers_is_plain_on_the_ranks_alone_and_gone_when_deleted(
    searched: Searched,
) -> None:
    ids = random_ids(1)
    canaries = await telling_canaries(searched, ids)
    async with Client(searched.address) as client:
        record = await client.upload_context("book", prompt_ids=ids, durable=True)
        in_use, files_in_use = searched.held(canaries), searched.in_files(canaries)
        await client.delete_context("book")
        at_once, files_after = searched.held(canaries), searched.in_files(canaries)

    assert record.tiers == (Tier.GPU, Tier.HOST, Tier.DISK)
    holders = {title for title, names in in_use.items() if ranks_in(names)}
    assert all(title.startswith("ray::Worker") for title in holders), holders
    assert ranks_in_all(in_use) == ALL_RANKS
    assert any("u32 ids" in names for names in in_use.values())
    assert files_in_use == files_after == {}
    # The caller is told of the end when the cache is zero; ids may stand in a connection's buffer.
    assert ranks_in_all(at_once) == set()


async def test_a_cluster_that_is_killed_leaves_nothing_in_files_or_shared_memory(
    searched: Searched,
) -> None:
    ids = random_ids(2)
    canaries = await telling_canaries(searched, ids)
    async with Client(searched.address) as client:
        await client.upload_context("book", prompt_ids=ids, durable=True)
        in_use = searched.held(canaries)
        searched.kill()
    searched.process.wait()
    # The control of the search itself: one file does hold them.
    (searched.folders[0] / "control").write_bytes(b"before" + canaries["u32 ids"] + b"after")

    assert ranks_in_all(in_use) == ALL_RANKS
    assert searched.in_files(canaries) == {"u32 ids": 1}


async def test_blocks_that_ranks_free_without_zeroing_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FORGETS_TO_ZERO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    ids = random_ids(3)
    with serving(tmp_path) as searched:
        canaries = await telling_canaries(searched, ids)
        async with Client(searched.address) as client:
            await client.upload_context("book", prompt_ids=ids)
            await client.delete_context("book")
            at_once = searched.held(canaries)

    assert ranks_in_all(at_once) == ALL_RANKS
