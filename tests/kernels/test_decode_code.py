"""What decode kernels become on a Hopper GPU."""

import pytest
from kvcluster_kernels.decode import default_settings

from tests.kernels.sm90 import Configuration, MachineCode, compiled

SHARED_BYTES = 228 * 1024
RESERVED_SHARED_BYTES = 1024
"""Of each program, by the driver."""
NUM_REGISTERS = 65536
"""Of a processor."""

_INT_POINTERS = ("blocks_ptr", "starts_ptr", "ends_ptr", "block_positions_ptr", "q_positions_ptr")


def exact(name: str, *, dim: int = 128, rows: int = 8, dtype: str = "bf16") -> Configuration:
    """As `decode.decode_splits` launches it, for 8 query heads of a KV head."""
    pointer = f"*{dtype}:16"
    settings = default_settings(rows, dim)
    return Configuration(
        name=name,
        module="kvcluster_kernels.decode",
        kernel="_decode_kernel",
        signature={
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), pointer),
            **dict.fromkeys(_INT_POINTERS, "*i32"),
            **dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32:16"),
            **dict.fromkeys(("scale", "softcap"), "fp32"),
            **dict.fromkeys(("window", "max_blocks", "num_splits"), "i32"),
            **{
                f"stride_{x}_{axis}": "i32:16"
                for x in "kv"
                for axis in ("page", "block", "head", "token")
            },
        },
        constants={
            "NUM_ROWS": rows,
            "GROUP": 8,
            "BLOCK_SIZE": 64,
            "PAGE_BLOCKS": 8,
            "DIM_K": dim,
            "DIM_V": dim,
            "BLOCK_M": max(16, rows),
            "TILE": settings.tile,
            "HAS_POSITIONS": rows > 8,
            "HAS_SOFTCAP": False,
            "HAS_WINDOW": False,
            "OVERLAPS": True,
            "UPCAST": False,
        },
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )


CONFIGURATIONS = (
    exact("D64", dim=64),
    exact("D96", dim=96),
    exact("D128"),
    exact("D256", dim=256),
    exact("D128 8 tokens", rows=64),
    exact("D128 16 tokens", rows=128),
    exact("D256 8 tokens", dim=256, rows=64),
    exact("D256 16 tokens", dim=256, rows=128),
    exact("D64 8 tokens", dim=64, rows=64),
    exact("D128 float16", dtype="fp16"),
)
NAMES = [configuration.name for configuration in CONFIGURATIONS]


@pytest.fixture(scope="module")
def codes() -> dict[str, MachineCode]:
    return compiled(CONFIGURATIONS)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=NAMES)
def test_nothing_is_spilled_and_all_programs_of_a_processor_fit_at_a_time(
    codes: dict[str, MachineCode], configuration: Configuration
) -> None:
    code = codes[configuration.name]
    rows, dim = (configuration.constants[name] for name in ("NUM_ROWS", "DIM_K"))
    programs = default_settings(rows, dim).programs_per_processor

    assert code.num_spills == 0
    assert programs * (code.shared_bytes + RESERVED_SHARED_BYTES) <= SHARED_BYTES
    assert programs * code.num_registers * 32 * configuration.num_warps <= NUM_REGISTERS


@pytest.mark.parametrize("name", NAMES)
def test_products_are_of_matrices_and_bytes_are_copied_ahead(
    codes: dict[str, MachineCode], name: str
) -> None:
    loop = codes[name].loop_opcodes

    assert loop.get("HGMMA" if "tokens" in name else "HMMA", 0) > 0
    assert loop.get("LDGSTS", 0) > 0
    assert "LDG" not in loop
