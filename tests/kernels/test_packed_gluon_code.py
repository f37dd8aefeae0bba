"""What the packed decode kernel for Hopper becomes: `test_packed_code.py` says what there is to
spend."""

import pytest

from tests.kernels.sm90 import Configuration, MachineCode, compiled
from tests.kernels.test_decode_code import NUM_REGISTERS, RESERVED_SHARED_BYTES, SHARED_BYTES
from tests.kernels.test_packed_code import _BLOCK_SIZE, _COMMON, _IS_SERVED_WITH, _WARP, constants

pytestmark = pytest.mark.skipif(not _IS_SERVED_WITH, reason="the kernel is not for this one")


def packed(
    name: str,
    bits: int,
    *,
    rows: int = 8,
    scale_bits: int = 16,
    group: int = 64,
    is_rotated: bool = False,
) -> Configuration:
    """As `packed_gluon_launch.splits` launches it, for heads of 128."""
    scale, zero, unit = {16: ("fp16", "fp16", "fp16"), 8: ("u8", "i8", "fp32")}[scale_bits]
    codes = "i8" if bits == 8 else "u8"
    planes = {"codes": codes, "high": codes, "scale": scale, "zero": zero, "unit": unit}
    dim = 128
    kept = {k: v for k, v in constants(dim, rows).items() if k != "IS_GPU"}
    return Configuration(
        name=name,
        module="kvcluster_kernels.packed_gluon",
        kernel="packed_kernel",
        signature={
            "q_ptr": "*fp32:16" if is_rotated else "*bf16:16",
            "plain_q_ptr": "*bf16:16",
            **{f"{x}_{plane}_ptr": f"*{kind}:16" for x in "kv" for plane, kind in planes.items()},
            **{f"stride_{x}_{plane}": "i32:16" for x in "kv" for plane in planes},
            **_COMMON,
        },
        constants={
            **kept,
            "BLOCK_M": min(16, rows),
            "K_BITS": bits,
            "V_BITS": bits,
            "K_GROUPS": 1 if is_rotated else _BLOCK_SIZE // group,
            "V_GROUPS": 1 if is_rotated else dim // group,
            "SCALE_BITS": scale_bits,
            "IS_ROTATED": is_rotated,
            "HAS_MEAN": is_rotated,
            "STAGES": 3 if bits == 4 and not is_rotated else 2,
            "BEGINS_EARLY": not is_rotated,
        },
        num_warps=1,
        num_stages=1,
        is_gluon=True,
    )


BUDGETS = (
    (packed("int8", 8), 2.2, 6),
    (packed("int4", 4), 2.1, 8),
    (packed("int4 scale_bits=8", 4, scale_bits=8), 2.5, 8),
    (packed("int3", 3), 2.9, 8),
    (packed("int2", 2, group=32), 2.4, 8),
    (packed("rotated4", 4, is_rotated=True), 4.3, 8),
    (packed("rotated3", 3, is_rotated=True), 3.4, 8),
    (packed("rotated2", 2, is_rotated=True), 3.1, 8),
    (packed("int4 2 tokens", 4, rows=16), 3.2, 8),
)
"""Instructions of a thread for each number of K and V, and programs that a processor has room for:
neither may get worse unseen."""
NAMES = [configuration.name for configuration, _, _ in BUDGETS]


@pytest.fixture(scope="module")
def codes() -> dict[str, MachineCode]:
    return compiled([configuration for configuration, _, _ in BUDGETS])


@pytest.mark.parametrize(("configuration", "budget", "programs"), BUDGETS, ids=NAMES)
def test_unpacking_keeps_to_its_budget_of_instructions(
    codes: dict[str, MachineCode], configuration: Configuration, budget: float, programs: int
) -> None:
    code = codes[configuration.name]
    numbers = 2 * _BLOCK_SIZE * configuration.constants["DIM_K"]

    assert not {"STL", "LDL"} & set(code.loop_opcodes)
    assert code.loop_length * _WARP / numbers <= budget


@pytest.mark.parametrize(("configuration", "budget", "programs"), BUDGETS, ids=NAMES)
def test_as_many_programs_fit_a_processor_as_are_launched(
    codes: dict[str, MachineCode], configuration: Configuration, budget: float, programs: int
) -> None:
    code = codes[configuration.name]

    assert programs * (code.shared_bytes + RESERVED_SHARED_BYTES) <= SHARED_BYTES
    assert programs * code.num_registers * _WARP <= NUM_REGISTERS


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_loop_waits_for_memory_or_crosses_lanes_but_weights(
    codes: dict[str, MachineCode], name: str
) -> None:
    loop = codes[name].loop_opcodes

    assert loop.get("HMMA", 0) > 0
    assert loop.get("MOVM", 0) == (16 if "tokens" in name else 8)
    assert loop.get("STS", 0) == 0
    # Ids of blocks and units of scales, which are asked for blocks ahead, and positions.
    assert loop.get("LDG", 0) <= {"int4 scale_bits=8": 3, "int4 2 tokens": 2}.get(name, 1)
    assert loop.get("BAR", 0) <= 2
