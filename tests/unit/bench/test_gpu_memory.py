"""What the GPU's tool says is read, and a machine without it has nothing to say."""

import os
from pathlib import Path

import pytest

from kvcluster.bench.gpu_memory import MemoryPeak, query_gpu


@pytest.fixture
def tool(tmp_path: Path) -> str:
    """Answers as nvidia-smi does, each time with more memory."""
    script = tmp_path / "smi"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"*memory*) echo x >> {tmp_path}/asked; echo $((100 * $(wc -l < {tmp_path}/asked)));;\n"
        "*name*) echo 'A GPU'; echo 'Another GPU';;\n"
        "*) exit 2;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return os.fspath(script)


def test_a_field_is_that_of_the_first_gpu(tool: str) -> None:
    assert query_gpu("name", tool) == "A GPU"


def test_without_the_tool_or_its_answer_there_is_none(tool: str) -> None:
    assert query_gpu("name", "no-such-tool") is None
    assert query_gpu("colour", tool) is None


def test_the_peak_is_the_largest_reading(tool: str, tmp_path: Path) -> None:
    with MemoryPeak(tool) as memory:
        while memory.peak_mib is None:
            os.sched_yield()

    num_asked = len((tmp_path / "asked").read_text().splitlines())
    assert memory.peak_mib == 100.0 * num_asked


def test_without_a_gpu_there_is_no_peak() -> None:
    with MemoryPeak("no-such-tool") as memory:
        pass

    assert memory.peak_mib is None
