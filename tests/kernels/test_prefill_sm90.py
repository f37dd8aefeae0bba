"""What the prefill kernels become on a Hopper GPU: no spills, matrix instructions, room enough."""

from functools import cache

import pytest
import triton
from kvcluster_kernels.prefill_gluon import pipeline_for

from tests.kernels import launches
from tests.kernels.prefill_cases import Case
from tests.kernels.prefill_launches import (
    LAUNCHES,
    SERVED_COPIED,
    SERVED_PIPELINED,
    SERVED_PORTABLE,
)
from tests.kernels.sm90 import MAX_SHARED_BYTES, MachineCode

# Whoever asks first compiles for all.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IS_SERVED = triton.__version__.startswith("3.6.")
"""Whether the pipelined kernel is for this release (`prefill_gluon.is_available`)."""
_MODULE = "tests.kernels.prefill_launches"


@cache
def portable_code() -> dict[str, MachineCode]:
    """Compiled once for the tests of this file."""
    return launches.compiled(
        _MODULE,
        [f"portable {case.name}{out}" for case in SERVED_PORTABLE for out in ("", " to bfloat16")]
        + [f"copied {case.name}" for case in SERVED_COPIED],
    )


@cache
def pipelined_code() -> dict[str, MachineCode]:
    """Likewise."""
    return launches.compiled(_MODULE, [f"pipelined {case.name}" for case in SERVED_PIPELINED])


def test_every_launch_on_a_gpu_is_one_that_triton_takes() -> None:
    """With the types, constants and None that the launchers hand over."""
    names = [name for name in LAUNCHES if name.startswith("test of ")]

    assert len(names) > 50
    assert launches.refusals(_MODULE, names) == {}


@pytest.mark.parametrize("case", SERVED_PORTABLE, ids=lambda case: case.name)
def test_the_portable_kernel_multiplies_on_the_matrix_unit_and_spills_nothing(case: Case) -> None:
    code = portable_code()[f"portable {case.name}"]

    assert code.num_spills == 0
    assert code.early_touches == []
    assert code.loop_opcodes["HGMMA"] > 0
    assert code.loop_opcodes["LDGSTS"] > 0, "keys are copied while others are multiplied"
    assert code.shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("case", SERVED_COPIED, ids=lambda case: case.name)
def test_the_copy_engine_fetches_keys_for_the_portable_kernel(case: Case) -> None:
    code = portable_code()[f"copied {case.name}"]

    assert code.num_spills == 0
    assert code.early_touches == []
    assert code.loop_opcodes["HGMMA"] > 0
    assert code.loop_opcodes["UTMALDG"] > 0, "keys are copied while others are multiplied"
    assert code.shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("case", SERVED_PORTABLE, ids=lambda case: case.name)
def test_nothing_is_spilled_in_the_loop_where_outputs_are_of_16_bits(case: Case) -> None:
    code = portable_code()[f"portable {case.name} to bfloat16"]

    assert code.early_touches == []
    assert not {"LDL", "STL"} & code.loop_opcodes.keys()


@pytest.mark.parametrize("case", SERVED_PIPELINED, ids=lambda case: case.name)
def test_the_pipelined_kernel_is_what_it_was_written_as(case: Case) -> None:
    code = pipelined_code()[f"pipelined {case.name}"]

    assert "ttg.warp_specialize" in code.ttgir
    assert code.early_touches == []
    assert code.count("UTMALDG") > 0
    assert code.shared_bytes <= MAX_SHARED_BYTES
    block_n = pipeline_for(case.key_dim, case.causal).block_n
    assert code.loop_opcodes["HGMMA"] == case.key_dim // 16 + block_n // 16


@pytest.mark.skipif(not IS_SERVED, reason="the kernel is not for this one")
@pytest.mark.parametrize("case", SERVED_PIPELINED, ids=lambda case: case.name)
def test_the_pipelined_kernel_spills_nothing(case: Case) -> None:
    assert pipelined_code()[f"pipelined {case.name}"].num_spills == 0


@pytest.mark.skipif(not IS_SERVED, reason="the kernel is not for this one")
def test_no_pipeline_touches_registers_of_products_under_way() -> None:
    """Of all that are measured on a GPU, not only those that were chosen."""
    names = [name for name in LAUNCHES if "Pipeline(" in name]

    codes = launches.compiled(_MODULE, names)

    assert len(codes) >= 10
    assert {name: code.early_touches for name, code in codes.items() if code.early_touches} == {}


@pytest.mark.skipif(not IS_SERVED, reason="serialised by this one")
@pytest.mark.parametrize("case", SERVED_PIPELINED, ids=lambda case: case.name)
def test_the_assembler_leaves_products_in_flight(case: Case) -> None:
    """One fence and one wait for each of two products: the assembler, where it does not follow
    what a kernel does with its accumulators, waits for every single instruction instead."""
    assert pipelined_code()[f"pipelined {case.name}"].loop_opcodes["WARPGROUP"] == 4
