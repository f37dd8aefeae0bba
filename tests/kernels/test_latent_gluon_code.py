"""What the latent decode kernel for Hopper becomes there."""

from functools import cache

import pytest

from tests.kernels import launches
from tests.kernels.latent_gluon_launches import LAUNCHES
from tests.kernels.sm90 import MachineCode
from tests.kernels.test_decode_code import NUM_REGISTERS, RESERVED_SHARED_BYTES, SHARED_BYTES
from tests.kernels.test_packed_code import _IS_SERVED_WITH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not _IS_SERVED_WITH, reason="the kernel is not for this one"),
]

_PROGRAMS = 2
_EDGE = 160
"""Instructions for blocks at an end or near the queries, which others jump over."""
BUDGETS = {
    "D128 r=0.25 rotated3": 960,
    "D128 r=0.375 rotated3": 1_100,
    "D128 r=0.25 rotated4": 1_010,
    "D128 r=0.25 int4": 960,
    "D64 r=0.375 rotated3": 750,
}
"""Instructions of a warp for 64 tokens of a KV head: must not get worse unseen. The matrix unit
takes r K D / 256 cycles to expand them, beside which two warps of a scheduler run."""


@cache
def codes() -> dict[str, MachineCode]:
    """Compiled once for the tests of this file."""
    return launches.compiled("tests.kernels.latent_gluon_launches", list(LAUNCHES))


@pytest.mark.parametrize("name", LAUNCHES)
def test_keys_are_expanded_from_registers_that_nothing_touches_meanwhile(name: str) -> None:
    code = codes()[name]

    assert code.num_spills == 0
    assert code.early_touches == []
    assert code.loop_opcodes["HGMMA"] > 0
    assert code.loop_opcodes["BAR"] == 2


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_programs_fit_a_processor(name: str) -> None:
    code = codes()[name]

    assert _PROGRAMS * (code.shared_bytes + RESERVED_SHARED_BYTES) <= SHARED_BYTES
    assert _PROGRAMS * 128 * code.num_registers <= NUM_REGISTERS


@pytest.mark.parametrize("name", BUDGETS)
def test_a_block_keeps_to_its_budget_of_instructions(name: str) -> None:
    assert codes()[name].loop_length <= BUDGETS[name] + _EDGE
