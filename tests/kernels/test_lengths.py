"""A kernel is compiled for a few lengths at most: a compilation takes seconds, and the prompt that
asks for it waits."""

from collections import defaultdict
from functools import cache

import pytest

from tests.kernels import launches
from tests.kernels.length_launches import CALLS, LENGTHS, name_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_CONTROL = "specialised"
_MERGE = {"_merge": 3}
"""Two places for partials, four or eight; one for one."""
_COMBINE = {"_combine_kernel": 4}
"""16 splits read together, 64, 128 or 256."""
_FEW_ROWS = {"prefill_kernel": 4, **_MERGE}
"""Split or not, and with tiles that end with the keys or not."""
_KEYS_AND_VALUES = 2
_VERSIONS: dict[str, dict[str, int]] = {
    # Few rows have smaller tiles; without rules, tiles may end with the keys.
    "portable causal": {"prefill_kernel": 2},
    "portable history": {"prefill_kernel": 4},
    "portable blocks": {"prefill_kernel": 4},
    "portable few rows": _FEW_ROWS,
    "copied few rows": _FEW_ROWS,
    "exact decode": _COMBINE,
    "integer decode": _COMBINE,
    "float8 decode": _COMBINE,
    "combined pools": {"_combine_pools_kernel": 4},
    "merge": {"_merge": 4},
    "packed prefill": _MERGE,
    "restored integers": {"_restore_kernel": _KEYS_AND_VALUES},
    "restored float8": {"_restore_kernel": _KEYS_AND_VALUES},
    "restored rotated": {"_level_kernel": _KEYS_AND_VALUES},
    "encoded integers": {"_integer_kernel": _KEYS_AND_VALUES},
    # Powers of two from 128 to 16,384 blocks.
    "pick": {"_choose_kernel": 8},
}
"""How many there may be of a kernel whatever the length; one of each that is not here."""


@cache
def versions() -> dict[str, dict[str, int]]:
    """Of each kernel that a call launches: how many are compiled for all lengths together. Found
    once for the tests of this file."""
    names = [name_of(call, length) for call in CALLS for length in LENGTHS]
    keys = launches.compile_keys("tests.kernels.length_launches", names)
    found: dict[str, dict[str, int]] = {}
    for call in CALLS:
        by_kernel = defaultdict(set)
        for length in LENGTHS:
            for key in keys[name_of(call, length)]:
                by_kernel[key.partition(" ")[0]].add(key)
        found[call] = {kernel: len(each) for kernel, each in by_kernel.items()}
    return found


@pytest.mark.parametrize("call", [call for call in CALLS if call != _CONTROL])
def test_a_kernel_is_compiled_for_few_lengths(call: str) -> None:
    allowed = _VERSIONS.get(call, {})

    too_many = {k: n for k, n in versions()[call].items() if n > allowed.get(k, 1)}

    assert too_many == {}


def test_a_kernel_that_is_specialised_for_lengths_is_found_out() -> None:
    assert versions()[_CONTROL]["_specialised_kernel"] > 1
