"""What the encoding kernels become on a Hopper GPU."""

from functools import cache

import pytest

from tests.kernels import launches
from tests.kernels.sm90 import MAX_SHARED_BYTES, MachineCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_MODULE = "tests.kernels.encode_launches"
_GATED = ("fp8 values", "int4 keys", "int4 values")


@cache
def code() -> dict[str, MachineCode]:
    """Compiled once for the tests of this file."""
    return launches.compiled(_MODULE, _GATED)


@pytest.mark.parametrize("name", _GATED)
def test_a_block_is_held_in_registers_and_nothing_is_spilled(name: str) -> None:
    found = code()[name]

    assert found.num_spills == 0
    assert found.shared_bytes <= MAX_SHARED_BYTES // 4


@pytest.mark.parametrize("name", _GATED)
def test_blocks_are_read_and_written_several_bytes_at_a_time(name: str) -> None:
    """Two bytes at a time, a program's 8,192 numbers would be 64 loads of 128 threads."""
    assert code()[name].count("LDG") <= 32
    assert code()[name].count("STG") <= 32


def test_other_formats_are_taken_by_triton() -> None:
    assert launches.refusals(_MODULE, ["bf16", "int8 keys", "int2 values", "rotated2 values"]) == {}
