"""What the kernels that choose keys, and read chosen ones, become on a Hopper GPU."""

from functools import cache

import pytest

from tests.kernels import launches
from tests.kernels.chosen_launches import CHOSEN, HEADS, LAUNCHES, PICKS, SUMS, TILED
from tests.kernels.sm90 import MAX_SHARED_BYTES, MachineCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@cache
def code() -> dict[str, MachineCode]:
    """Compiled once for the tests of this file."""
    return launches.compiled("tests.kernels.chosen_launches", list(LAUNCHES))


@pytest.mark.parametrize("name", [*SUMS, *CHOSEN, *TILED, *HEADS])
def test_all_is_multiplied_on_the_matrix_unit_and_nothing_is_spilled(name: str) -> None:
    found = code()[name]

    assert found.num_spills == 0
    assert found.early_touches == []
    assert found.loop_opcodes["LDGSTS"] > 0
    assert found.shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("name", SUMS)
def test_sums_take_one_product_of_queries_and_keys(name: str) -> None:
    """Of 128 keys and 128 rows, an eighth of the head at a time: one for each half of the rows."""
    dim = 64 if "head 64" in name else 128

    assert code()[name].loop_opcodes["HGMMA"] == dim // 16


@pytest.mark.parametrize("name", [*CHOSEN, *TILED, *HEADS])
def test_chosen_blocks_are_copied_while_others_are_multiplied(name: str) -> None:
    assert code()[name].loop_opcodes["HGMMA"] > 0
    # Numbers of blocks for the mask, a step before.
    assert code()[name].loop_opcodes.get("LDG", 0) <= 1


@pytest.mark.parametrize("name", PICKS)
def test_what_picks_blocks_stays_in_registers(name: str) -> None:
    assert code()[name].num_spills == 0
