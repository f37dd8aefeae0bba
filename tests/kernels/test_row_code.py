"""What the kernels of single rows become on a Hopper GPU."""

from functools import cache

import pytest

from tests.kernels import launches
from tests.kernels.row_launches import LAUNCHES
from tests.kernels.sm90 import MachineCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_PRODUCTS = ("three products of a normed row", "a product and a residual", "a gated product")


@cache
def code() -> dict[str, MachineCode]:
    """Compiled once for the tests of this file."""
    return launches.compiled("tests.kernels.row_launches", list(LAUNCHES))


@pytest.mark.parametrize("name", LAUNCHES)
def test_nothing_is_spilled_and_kernels_overlap(name: str) -> None:
    found = code()[name]

    assert found.num_spills == 0
    # Lets the next kernel start, and waits for the one before.
    assert found.count("PREEXIT") == 1
    assert found.count("ACQBULK") == 1


@pytest.mark.parametrize("name", _PRODUCTS)
def test_weights_are_read_sixteen_bytes_at_a_time(name: str) -> None:
    """A turn reads 4 x 512 numbers of a weight with 128 threads: two loads of each, and four of the
    row and its norm at most."""
    num_weights = 2 if name == "a gated product" else 1

    assert 2 * num_weights <= code()[name].loop_opcodes["LDG"] <= 2 * num_weights + 4


@pytest.mark.parametrize("name", _PRODUCTS)
def test_several_programs_fit_a_processor(name: str) -> None:
    """Of 65,536 registers, with 128 threads: three programs or more."""
    assert code()[name].num_registers <= 168
