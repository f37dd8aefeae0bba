"""What kernels over latents become on a Hopper GPU."""

from functools import cache

import pytest
import triton

from tests.kernels import launches
from tests.kernels.latent_launches import ABSORBED, IN_GROUPS, LATENTS
from tests.kernels.sm90 import MAX_SHARED_BYTES, MachineCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_MODULE = "tests.kernels.latent_launches"
_GATED = (
    "D128 latent r=0.25 bits=4 values=int4",
    "D128 latent r=0.25 bits=16 values=int4",
    "D64 latent r=0.25 bits=4 values=int4",
)

_SPILLS = 0 if triton.__version__.startswith("3.6.") else 20
"""In the loop of 64 rows of 512 sums. What Triton 3.6, which GPUs are served with, makes fits."""


@cache
def code() -> dict[str, MachineCode]:
    """Compiled once for the tests of this file."""
    return launches.compiled(_MODULE, [*_GATED, *ABSORBED, *IN_GROUPS])


def test_every_launch_is_one_that_triton_takes() -> None:
    assert launches.refusals(_MODULE, [name for name in LATENTS if name not in _GATED]) == {}


@pytest.mark.parametrize("name", _GATED)
def test_keys_are_expanded_on_the_matrix_unit_from_registers_that_suffice(name: str) -> None:
    found = code()[name]

    assert found.num_spills == 0
    assert found.early_touches == []
    assert found.loop_opcodes["HGMMA"] > 0
    assert found.shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("name", IN_GROUPS)
def test_what_the_compiler_moves_of_the_way_back_fits_a_processor(name: str) -> None:
    found = code()[name]

    assert found.num_spills == 0
    assert found.shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("name", _GATED)
def test_latents_are_copied_ahead_and_the_way_back_stays_in_shared_memory(name: str) -> None:
    """The rows of `up` would be read by 16 bytes: none are left in the loop."""
    found = code()[name]

    assert found.loop_opcodes["LDGSTS"] > 0
    assert found.loop_opcodes.get("LDG", 0) <= 4


@pytest.mark.parametrize("name", ABSORBED)
def test_latents_as_they_are_meet_the_matrix_unit_twice(name: str) -> None:
    found = code()[name]

    assert found.loop_opcodes.get("LDL", 0) + found.loop_opcodes.get("STL", 0) <= _SPILLS
    assert "LDG" not in found.loop_opcodes
    assert found.early_touches == []
    assert found.loop_opcodes.get("HMMA", 0) + found.loop_opcodes.get("HGMMA", 0) > 0
    assert found.loop_opcodes["LDGSTS"] > 0
    assert found.shared_bytes <= MAX_SHARED_BYTES
