"""What prefill over encoded blocks becomes on a Hopper GPU: matrix instructions, and no spills
where the time goes."""

import pytest
import triton

from tests.kernels import launches
from tests.kernels.packed_prefill_launches import EXPANDED, LAUNCHES, RESTORED, SERVED
from tests.kernels.sm90 import MAX_SHARED_BYTES, MachineCode

# Whoever asks first compiles for all.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_MODULE = "tests.kernels.packed_prefill_launches"
_IS_SERVED_WITH = triton.__version__.startswith("3.6.")
"""Whether this is the Triton that GPUs are served with."""


@pytest.fixture(scope="module")
def codes() -> dict[str, MachineCode]:
    names = [name for name in LAUNCHES if not name.startswith("test of ")]
    return launches.compiled(_MODULE, names)


def test_every_launch_on_a_gpu_is_one_that_triton_takes() -> None:
    names = [name for name in LAUNCHES if name.startswith("test of ")]

    assert len(names) > 20
    assert launches.refusals(_MODULE, names) == {}


@pytest.mark.parametrize("name", SERVED)
def test_blocks_are_multiplied_on_the_matrix_unit(codes: dict[str, MachineCode], name: str) -> None:
    code = codes[f"packed {name}"]

    assert code.early_touches == []
    assert code.loop_opcodes["HGMMA"] > 0
    assert code.loop_opcodes["LDGSTS"] > 0, "blocks are copied while others are multiplied"
    assert code.shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.skipif(not _IS_SERVED_WITH, reason="GPUs are served with another Triton")
@pytest.mark.parametrize("name", SERVED)
def test_nothing_is_spilled_where_blocks_are_multiplied(
    codes: dict[str, MachineCode], name: str
) -> None:
    assert not {"LDL", "STL"} & codes[f"packed {name}"].loop_opcodes.keys()


@pytest.mark.skipif(not _IS_SERVED_WITH, reason="GPUs are served with another Triton")
@pytest.mark.parametrize("name", [*SERVED, *EXPANDED, *RESTORED])
def test_several_programs_that_restore_fit_a_processor(
    codes: dict[str, MachineCode], name: str
) -> None:
    code = codes[f"restore {name}"]

    assert code.num_spills == 0
    assert code.num_registers <= 128
    assert code.shared_bytes <= MAX_SHARED_BYTES // 4


@pytest.mark.skipif(not _IS_SERVED_WITH, reason="GPUs are served with another Triton")
@pytest.mark.parametrize("name", EXPANDED)
def test_latents_are_expanded_on_the_matrix_unit(codes: dict[str, MachineCode], name: str) -> None:
    code = codes[f"expand {name}"]

    assert code.early_touches == []
    assert code.num_spills == 0
    assert code.count("HGMMA") > 0
    assert code.shared_bytes <= MAX_SHARED_BYTES // 2
