"""An engine has a folder in the host's memory of its own, and leaves none behind for long."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcluster.cache.spill_parts import write_part
from kvcluster.errors import ConfigError
from kvcluster.serve.host_memory import HostMemory
from tests.unit.cache.test_spill import KEYS, PARTS, owner

ROOT = Path(__file__).parents[3]
MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="this system has no /dev/shm")


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory."""
    made = MEMORY / f"test-{os.getpid()}-{tmp_path.name}"
    made.mkdir()
    yield made
    shutil.rmtree(made)


def offloaded(memory: HostMemory) -> int:
    ticket = memory.begin(owner(), KEYS, num_parts=1)
    return memory.commit(ticket, [write_part(ticket, 0, PARTS[0])], KEYS).num_bytes


def folders(base: Path) -> list[Path]:
    return [path for path in base.iterdir() if path.is_dir()]


def test_each_engine_has_a_folder_of_its_own_which_nobody_else_can_read(base: Path) -> None:
    one, two = (HostMemory(base, capacity_bytes=1) for _ in range(2))
    num_bytes = offloaded(one)

    assert len(folders(base)) == 2
    assert {folder.stat().st_mode & 0o777 for folder in folders(base)} == {0o700}
    assert [each.num_bytes for each in one.listed()] == [num_bytes]
    assert two.listed() == []
    one.close()
    two.close()
    assert folders(base) == []


def test_what_a_killed_engine_left_goes_when_the_next_one_starts(base: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.unit.serve.test_host_memory import HostMemory, offloaded\n"
        f"memory = HostMemory(Path({str(base)!r}), capacity_bytes=1)\n"
        "offloaded(memory)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"ready\n"
        beside = HostMemory(base, capacity_bytes=1)
        assert len(folders(base)) == 2, "what is in use stays"
        engine.send_signal(signal.SIGKILL)
    assert len(folders(base)) == 2
    beside.close()

    memory = HostMemory(base, capacity_bytes=1)

    assert len(folders(base)) == 1
    assert memory.listed() == []
    memory.close()


def test_a_folder_that_is_not_in_memory_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spill\.host_folder: want a folder in memory"):
        HostMemory(tmp_path, capacity_bytes=1)


def test_a_folder_that_is_not_there_is_a_wrong_setting(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"spill\.host_folder: .* No such file"):
        HostMemory(base / "none", capacity_bytes=1)


def test_more_than_the_machine_has_is_a_wrong_setting(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"spill\.host_capacity_bytes: want at most"):
        HostMemory(base, capacity_bytes=1 << 60)
