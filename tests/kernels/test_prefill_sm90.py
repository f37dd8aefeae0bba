"""What the prefill kernels become on a Hopper GPU: no spills, matrix instructions, room enough."""

from functools import cache

import pytest
import triton
from kvcluster_kernels.prefill_arguments import Causal
from kvcluster_kernels.prefill_gluon import pipeline_for, registers
from kvcluster_kernels.prefill_tl import tiles_for
from triton.experimental.gluon.language import NVMMASharedLayout

from tests.kernels.sm90 import MAX_SHARED_BYTES, Configuration, MachineCode, compiled

# Whoever asks first compiles for all.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IS_SERVED = triton.__version__.startswith("3.6.")
"""Whether the pipelined kernel is for this release (`prefill_gluon.is_available`)."""

_POINTERS = ("out_ptr", "lse_ptr", "carry_out_ptr", "carry_lse_ptr")
_NUMBERS = ("num_tokens", "num_keys", "start", "split", "resume")
_STRIDES = ("q_t", "q_h", "k_p", "k_h", "k_s", "v_p", "v_h", "v_s")


def portable(
    name: str, key_dim: int, value_dim: int, *, block_tokens: int = 0, **constants: object
) -> Configuration:
    """The portable kernel with the tiles that these heads get."""
    tiles = tiles_for(max(key_dim, value_dim), block_tokens=block_tokens)
    padded = {dim: 1 << (dim - 1).bit_length() for dim in (key_dim, value_dim)}
    signature = {
        **{f"{x}_ptr": "*bf16:16" for x in "qkv"},
        **dict.fromkeys((*_POINTERS, "sinks_ptr"), "*fp32:16"),
        "blocks_ptr": "*i32:16",
        **dict.fromkeys((*_NUMBERS, "window"), "i32"),
        **dict.fromkeys(("scale2", "softcap2"), "fp32"),
        **{f"stride_{x}": "i32:16" for x in _STRIDES},
    }
    rules = dict.fromkeys(("CAUSAL", "WINDOWED", "SOFTCAPPED", "CARRIED", "SINKS"), False)
    return Configuration(
        name=name,
        module="kvcluster_kernels.prefill_tl_kernel",
        kernel="prefill_kernel",
        signature=signature,
        constants={
            **{"GROUP": 4, "NUM_KV_HEADS": 8, "NUM_SPLITS": 1},
            **{"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n},
            **{"KEY_DIM": key_dim, "VALUE_DIM": value_dim},
            **{"PADDED_KEY_DIM": padded[key_dim], "PADDED_VALUE_DIM": padded[value_dim]},
            **{
                "BLOCK_TOKENS": block_tokens,
                "PAGE_BLOCKS": 8,
                "UPCAST": False,
                "PRECISION": "tf32",
            },
            **rules,
            **constants,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def pipelined(
    name: str, dim: int, *, is_causal: bool = False, is_carried: bool = False, block_tokens: int = 0
) -> Configuration:
    """The pipelined kernel with the pipeline that these heads get."""
    pipeline = pipeline_for(dim, Causal() if is_causal else None)
    key_rows = min(block_tokens or pipeline.block_n, pipeline.block_n)
    return Configuration(
        name=name,
        module="kvcluster_kernels.prefill_gluon_kernel",
        kernel="prefill_kernel",
        signature={
            "q_desc": _descriptor(64, 1, dim),
            **dict.fromkeys(("k_desc", "v_desc"), _descriptor(1, 1, key_rows, dim)),
            "blocks_ptr": "*i32:16",
            **dict.fromkeys(_POINTERS, "*fp32:16"),
            **dict.fromkeys(("num_row_tiles", *_NUMBERS, "heads_at_once"), "i32"),
            "scale2": "fp32",
        },
        constants={
            **{"NUM_HEADS": 32, "GROUP": 4, "DIM": dim},
            **{"BLOCK_M": 64, "BLOCK_N": pipeline.block_n, "CONSUMERS": pipeline.num_consumers},
            **{"STAGES": pipeline.num_stages, "REGISTERS": registers(pipeline)},
            **{"BLOCK_TOKENS": block_tokens, "PAGE_BLOCKS": 8, "PING_PONG": pipeline.takes_turns},
            **{"CAUSAL": is_causal, "CARRIED": is_carried},
        },
        num_warps=4,
        is_gluon=True,
    )


def _descriptor(*shape: int) -> str:
    return f"tensordesc<bf16{list(shape)},{NVMMASharedLayout(128, 16, len(shape))!r}>"


PORTABLE = (
    portable("head 64", 64, 64, CARRIED=True),
    portable("head 96 causal", 96, 96, CAUSAL=True, CARRIED=True),
    portable("head 128", 128, 128, CARRIED=True),
    portable("head 128 causal in blocks", 128, 128, CAUSAL=True, block_tokens=64, CARRIED=True),
    portable("head 256 causal", 256, 256, CAUSAL=True),
    portable("head 256 in blocks", 256, 256, block_tokens=64),
    portable(
        "head 128 window, softcap, sinks", 128, 128,
        CAUSAL=True, WINDOWED=True, SOFTCAPPED=True, SINKS=True,
    ),
)  # fmt: skip
PIPELINED = (
    pipelined("head 64", 64),
    pipelined("head 64 causal", 64, is_causal=True, is_carried=True),
    pipelined("head 128", 128, is_carried=True),
    pipelined("head 128 causal", 128, is_causal=True, is_carried=True),
    pipelined("head 128 in blocks", 128, block_tokens=64),
)


@cache
def portable_code() -> dict[str, MachineCode]:
    """Compiled once for the tests of this file."""
    return compiled(PORTABLE)


@cache
def pipelined_code() -> dict[str, MachineCode]:
    """Likewise."""
    return compiled(PIPELINED)


@pytest.mark.parametrize("configuration", PORTABLE, ids=lambda each: each.name)
def test_the_portable_kernel_multiplies_on_the_matrix_unit_and_spills_nothing(
    configuration: Configuration,
) -> None:
    code = portable_code()[configuration.name]

    assert code.num_spills == 0
    assert code.early_touches == []
    assert code.loop_opcodes["HGMMA"] > 0
    assert code.loop_opcodes["LDGSTS"] > 0, "keys are copied while others are multiplied"
    assert code.shared_bytes <= MAX_SHARED_BYTES


@pytest.mark.parametrize("configuration", PIPELINED, ids=lambda each: each.name)
def test_the_pipelined_kernel_is_what_it_was_written_as(configuration: Configuration) -> None:
    code = pipelined_code()[configuration.name]

    assert "ttg.warp_specialize" in code.ttgir
    assert code.early_touches == []
    assert code.count("UTMALDG") > 0
    assert code.shared_bytes <= MAX_SHARED_BYTES
    steps = configuration.constants["DIM"] // 16 + configuration.constants["BLOCK_N"] // 16
    assert code.loop_opcodes["HGMMA"] == steps


@pytest.mark.skipif(not IS_SERVED, reason="the kernel is not for this one")
@pytest.mark.parametrize("configuration", PIPELINED, ids=lambda each: each.name)
def test_the_pipelined_kernel_spills_nothing(configuration: Configuration) -> None:
    assert pipelined_code()[configuration.name].num_spills == 0


@pytest.mark.skipif(not IS_SERVED, reason="serialised by this one")
@pytest.mark.parametrize("configuration", PIPELINED, ids=lambda each: each.name)
def test_the_assembler_leaves_products_in_flight(configuration: Configuration) -> None:
    """One fence and one wait for each of two products: the assembler, where it does not follow
    what a kernel does with its accumulators, waits for every single instruction instead."""
    assert pipelined_code()[configuration.name].loop_opcodes["WARPGROUP"] == 4
