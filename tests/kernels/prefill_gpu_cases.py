"""Cases of the prefill kernels as compiled: with several tiles, or of the pipelined kernel."""

from dataclasses import replace

import torch
from kvcluster_kernels import prefill_gluon
from kvcluster_kernels.prefill_arguments import Causal, PartialAttention
from kvcluster_kernels.prefill_gluon import Pipeline

from tests.kernels.prefill_cases import DIMS, LAYOUTS, RULES, Arguments, Case

FACTOR = 7
"""Cases of the interpreter with as many times the tokens and keys: several tiles, all ragged."""
PORTABLE = [
    *(replace(case, dtype=torch.bfloat16) for case in (*DIMS, *RULES, *LAYOUTS)),
    *(
        replace(case, dtype=dtype, name=f"{case.name} {dtype}")
        for case in (*DIMS[:1], *RULES[-1:], *LAYOUTS[:1])
        for dtype in (torch.float16, torch.float32)
    ),
]
PIPELINED = (
    Case(name="full"),
    Case(name="one step", num_keys=9),
    Case(name="one key", num_keys=1),
    Case(name="one token", num_tokens=1),
    Case(name="carry", is_carried=True),
    Case(name="causal", num_tokens=1003, num_keys=1003, causal=Causal()),
    Case(name="chunk after history", causal=Causal(start=630)),
    Case(name="zigzag", causal=Causal(3, 130, 500), is_carried=True),
    Case(name="fewer keys than rows", num_keys=70, causal=Causal()),
    Case(name="blocks of 64", num_keys=832, block_tokens=64),
    Case(name="blocks of 16", num_keys=208, block_tokens=16),
    Case(name="blocks of 256", num_keys=1024, block_tokens=256),
    Case(name="blocks and causal", num_keys=832, block_tokens=64, causal=Causal(start=500)),
    Case(name="many tiles", num_tokens=2311, num_heads=16, num_kv_heads=8, num_keys=777),
    Case(name="many causal tiles", num_tokens=2311, num_heads=16, num_kv_heads=8, num_keys=2311,
         causal=Causal()),
)  # fmt: skip
COPIED = [
    replace(case, key_dim=dim, value_dim=dim, dtype=torch.bfloat16, name=f"{case.name} {dim}")
    for case in (*(case for case in PIPELINED if case.block_tokens is None), *RULES)
    for dim in (64, 128)
]
"""Keys that the copy engine fetches for the portable kernel."""
PIPELINES = (
    Pipeline(),
    Pipeline(takes_turns=False),
    Pipeline(is_persistent=True),
    Pipeline(holds_queries=True, takes_turns=False),
    Pipeline(num_stages=3),
    Pipeline(num_consumers=3, block_n=64, num_stages=4, is_persistent=True),
    Pipeline(block_n=64, num_stages=3),
)


def shaped(case: Case, dim: int) -> Case:
    """A case of the pipelined kernel with heads of this size, in numbers that it takes."""
    dtype = torch.float16 if case.name == "full" else torch.bfloat16
    return replace(case, key_dim=dim, value_dim=dim, dtype=dtype)


def dim_for(pipeline: Pipeline) -> int:
    """A head size for which there are registers enough."""
    return 64 if pipeline.num_consumers == 3 else 128


def pipelined(given: Arguments, pipeline: Pipeline | None = None) -> PartialAttention:
    """The pipelined kernel's result."""
    return prefill_gluon.prefill(
        given.q_THD,
        given.keys,
        scale=given.scale,
        causal=given.causal,
        carry=given.carry,
        pipeline=pipeline,
    )
