"""Calls of the prefill kernels whose code is looked at on machines without a GPU (`launches`):
of the sizes that are served, and all that the tests on a GPU make."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from kvcluster_kernels import prefill_tl
from kvcluster_kernels.prefill_arguments import BlockBound, Causal, PartialAttention
from kvcluster_kernels.prefill_gluon import Pipeline
from kvcluster_kernels.prefill_tl import tiles_for

from tests.kernels.prefill_cases import Case, arguments
from tests.kernels.prefill_gpu_cases import (
    COPIED,
    FACTOR,
    PIPELINED,
    PIPELINES,
    PORTABLE,
    dim_for,
    pipelined,
    shaped,
)

_CPU = torch.device("cpu")
_SERVED = Case(
    name="served",
    num_tokens=256,
    num_keys=512,
    num_heads=32,
    num_kv_heads=8,
    key_dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
)


def _served(name: str, dim: int, **changes: object) -> Case:
    return replace(_SERVED, name=name, key_dim=dim, value_dim=dim, **changes)


SERVED_PORTABLE = (
    _served("head 64", 64, is_carried=True),
    _served("head 96 causal", 96, causal=Causal(256), is_carried=True),
    _served("head 128", 128),
    _served("head 128 with a carry", 128, is_carried=True),
    _served("head 128 causal in blocks", 128, causal=Causal(256), block_tokens=64, is_carried=True),
    _served("head 256 causal", 256, causal=Causal(256)),
    _served("head 256 in blocks", 256, block_tokens=64),
    _served(
        "head 128 window, softcap, sinks",
        128,
        causal=Causal(256, window=100),
        softcap=5.0,
        has_sinks=True,
    ),
    _served(
        "head 64 before a block", 64, causal=Causal(256, bound=BlockBound(64, 4, is_before=True))
    ),
    _served(
        "head 128 from a block on",
        128,
        causal=Causal(256, bound=BlockBound(64, 4, is_before=False)),
        is_carried=True,
    ),
)
SERVED_PIPELINED = (
    _served("head 64", 64),
    _served("head 64 causal", 64, causal=Causal(256), is_carried=True),
    _served("head 128", 128),
    _served("head 128 with a carry", 128, is_carried=True),
    _served("head 128 causal", 128, causal=Causal(256), is_carried=True),
    _served("head 128 in blocks", 128, block_tokens=64),
)


SERVED_COPIED = tuple(
    case for case in SERVED_PORTABLE if case.block_tokens is None and case.key_dim in (64, 128)
)
"""What the copy engine of a Hopper GPU fetches keys for."""


def _portable(
    case: Case, out_dtype: torch.dtype = torch.float32, *, is_copied: bool = False
) -> PartialAttention:
    given = arguments(case, _CPU)
    tiles = tiles_for(case.key_dim, is_copied=True) if is_copied else None
    return prefill_tl.prefill(
        given.q_THD,
        given.keys,
        **given.rules(),
        num_splits=case.num_splits,
        out_dtype=out_dtype,
        tiles=tiles,
    )


def _pipelined(case: Case, pipeline: Pipeline | None = None) -> PartialAttention:
    return pipelined(arguments(case, _CPU), pipeline)


LAUNCHES: dict[str, Callable[[], object]] = {
    **{f"portable {case.name}": partial(_portable, case) for case in SERVED_PORTABLE},
    **{
        f"portable {case.name} to bfloat16": partial(_portable, case, torch.bfloat16)
        for case in SERVED_PORTABLE
    },
    **{f"copied {case.name}": partial(_portable, case, is_copied=True) for case in SERVED_COPIED},
    **{f"pipelined {case.name}": partial(_pipelined, case) for case in SERVED_PIPELINED},
    **{f"test of copied {case.name}": partial(_portable, case, is_copied=True) for case in COPIED},
    **{
        f"test of portable {case.name}": partial(_portable, case.scaled(FACTOR))
        for case in PORTABLE
        if case.num_tokens
    },
    **{
        f"test of pipelined {case.name} {dim}": partial(_pipelined, shaped(case, dim))
        for case in PIPELINED
        for dim in (64, 128)
    },
    **{
        f"test of pipelined {case.name} {pipeline}": partial(
            _pipelined, shaped(case, dim_for(pipeline)), pipeline
        )
        for case in PIPELINED[-2:]
        for pipeline in PIPELINES
    },
}
