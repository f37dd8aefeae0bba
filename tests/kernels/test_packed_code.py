"""What decode kernels over packed caches become on a Hopper GPU.

At full bandwidth an H100 has 2.3 instructions of a thread for each bit of the cache that arrives:
10 for a code of 4 bits with its share of scales, 19 for 8. Other things than issue slots are in the
way, so the budgets are about half.
"""

import pytest
import triton

from tests.kernels.sm90 import MAX_SHARED_BYTES, Configuration, MachineCode, compiled

_WARP = 32
_BLOCK_SIZE = 64
_COMMON = {
    **dict.fromkeys(
        ("blocks_ptr", "starts_ptr", "ends_ptr", "block_positions_ptr", "q_positions_ptr"),
        "*i32",
    ),
    **dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32:16"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
    **dict.fromkeys(("window", "max_blocks", "num_splits"), "i32"),
}


def constants(dim: int, rows: int) -> dict[str, object]:
    return {
        "NUM_ROWS": rows,
        "GROUP": 8,
        "BLOCK_M": min(32, rows),
        "HAS_POSITIONS": rows > 8,
        "HAS_SOFTCAP": False,
        "HAS_WINDOW": False,
        "OVERLAPS": True,
        "BLOCK_SIZE": _BLOCK_SIZE,
        "PAGE_BLOCKS": 28,
        "DIM_K": dim,
        "DIM_V": dim,
        "IS_GPU": True,
    }


def integers(
    name: str, bits: int, num_warps: int, *, dim: int = 128, rows: int = 8, scale_bits: int = 16
) -> Configuration:
    """As `integer_decode.integer_splits` launches it, for 8 query heads of a KV head."""
    group = 32 if bits == 2 else 64
    codes = "*i8:16" if bits == 8 else "*u8:16"
    planes = {
        "codes": codes,
        "high": codes,
        "scale": "*fp16:16" if scale_bits == 16 else "*u8:16",
        "zero": "*fp16:16" if scale_bits == 16 else "*i8:16",
        "unit": "*fp16:16" if scale_bits == 16 else "*fp32:16",
    }
    return Configuration(
        name=name,
        module="kvcluster_kernels.integer_decode",
        kernel="_integer_kernel",
        signature={
            "q_ptr": "*bf16:16",
            **{f"{x}_{plane}_ptr": kind for x in "kv" for plane, kind in planes.items()},
            **{f"stride_{x}_{plane}": "i32:16" for x in "kv" for plane in planes},
            **_COMMON,
        },
        constants={
            **constants(dim, rows),
            "K_BITS": bits,
            "V_BITS": bits,
            "K_GROUPS": _BLOCK_SIZE // group,
            "V_GROUPS": dim // group,
            "SCALE_BITS": scale_bits,
            "BEGINS_EARLY": True,
        },
        num_warps=num_warps,
        num_stages=6,
    )


def float8(name: str, *, dim: int = 128, rows: int = 8) -> Configuration:
    """As `float8_decode.float8_splits` launches it."""
    return Configuration(
        name=name,
        module="kvcluster_kernels.float8_decode",
        kernel="_float8_kernel",
        signature={
            "q_ptr": "*bf16:16",
            **dict.fromkeys(("k_ptr", "v_ptr"), "*fp8e4nv:16"),
            **dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32:16"),
            **{f"stride_{x}": "i32:16" for x in ("k", "k_scale", "v", "v_scale")},
            **_COMMON,
        },
        constants={**constants(dim, rows), "BLOCK_M": min(64, rows), "BEGINS_EARLY": True},
        num_warps=4,
        num_stages=6,
    )


def rotated(name: str, bits: int, num_warps: int, *, dim: int = 128) -> Configuration:
    """As `rotated_decode.rotated_splits` launches it."""
    planes = ("k_scale", "k_mean", "v_scale")
    codes = ("k_codes", "k_high", "v_codes", "v_high")
    kept = {k: v for k, v in constants(dim, 8).items() if k not in ("DIM_K", "DIM_V")}
    return Configuration(
        name=name,
        module="kvcluster_kernels.rotated_decode",
        kernel="_rotated_kernel",
        signature={
            "q_ptr": "*bf16:16",
            "rotated_q_ptr": "*fp32:16",
            **{f"{plane}_ptr": "*u8:16" for plane in codes},
            **{f"{plane}_ptr": "*fp16:16" for plane in planes},
            **{f"stride_{plane}": "i32:16" for plane in (*codes, *planes)},
            **_COMMON,
        },
        constants={**kept, "DIM": dim, "BITS": bits, "HAS_MEAN": True},
        num_warps=num_warps,
        num_stages=6,
    )


_IS_SERVED_WITH = triton.__version__.startswith("3.6.")
"""Whether this is the Triton that GPUs are served with."""

_OTHER = 0.0 if _IS_SERVED_WITH else 0.4
"""What products of floats take more with another Triton: it moves numbers between lanes."""

BUDGETS = (
    (rotated("rotated4", 4, 1), 4.6),
    (rotated("rotated3", 3, 2), 7.5),
    (integers("int4", 4, 1), 2.8),
    (integers("int8", 8, 2), 3.8),
    (integers("int2 D64", 2, 2, dim=64), 8.5),
    (integers("int4 8 tokens", 4, 4, rows=64), 10.8),
    (float8("fp8"), 3.0 + _OTHER),
    (float8("fp8 D64", dim=64), 4.9 + _OTHER),
    (float8("fp8 8 tokens", rows=64), 8.0),
)
"""Instructions of a thread for each number of K and V, which must not grow unseen. With 8 tokens, a
program of integers works for four of them. On Hopper only floats are served with these kernels:
`test_packed_gluon_code.py`."""
_SPILLS = {} if _IS_SERVED_WITH else {"rotated4": 26, "rotated2": 8}
"""One warp holds all that a block of 4 bits becomes, in 255 registers. What Triton 3.6 makes fits;
of what 3.9 makes, a few instructions move numbers to local memory and back."""

NAMES = [configuration.name for configuration, _ in BUDGETS]


@pytest.fixture(scope="module")
def codes() -> dict[str, MachineCode]:
    return compiled([configuration for configuration, _ in BUDGETS])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_spilled_and_several_programs_fit(
    codes: dict[str, MachineCode], name: str
) -> None:
    code = codes[name]

    assert code.num_spills <= _SPILLS.get(name, 0)
    assert code.shared_bytes <= MAX_SHARED_BYTES // 3


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_copied_ahead_and_multiplied_as_matrices(
    codes: dict[str, MachineCode], name: str
) -> None:
    loop = codes[name].loop_opcodes

    assert loop.get("HMMA", 0) + loop.get("HGMMA", 0) > 0
    assert loop.get("LDGSTS", 0) > 0
    assert "LDG" not in loop


@pytest.mark.parametrize(("configuration", "budget"), BUDGETS, ids=NAMES)
def test_unpacking_keeps_to_its_budget_of_instructions(
    codes: dict[str, MachineCode], configuration: Configuration, budget: float
) -> None:
    dim = configuration.constants.get("DIM_K") or configuration.constants["DIM"]
    numbers = 2 * _BLOCK_SIZE * dim
    threads = _WARP * configuration.num_warps

    assert codes[configuration.name].loop_length * threads / numbers <= budget
