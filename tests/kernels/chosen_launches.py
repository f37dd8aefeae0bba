"""Calls of the kernels that choose keys, and read chosen ones, whose code is looked at on machines
without a GPU (`launches`)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from kvcluster_kernels.column_sums import column_sums
from kvcluster_kernels.prefill_arguments import Causal
from kvcluster_kernels.sparse_prefill import sparse_prefill

from tests.kernels.prefill_cases import Case, arguments
from tests.kernels.test_sparse_prefill import drawn_lists

_CPU = torch.device("cpu")
_SERVED = Case(
    name="head 128 in blocks",
    num_tokens=256,
    num_keys=512,
    num_heads=32,
    num_kv_heads=8,
    key_dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
    block_tokens=64,
)
SERVED = (
    _SERVED,
    replace(_SERVED, name="head 128 causal", causal=Causal(256)),
    replace(_SERVED, name="head 64", key_dim=64, value_dim=64),
)


def _sums(case: Case) -> object:
    given = arguments(case, _CPU)
    lse_TH = torch.zeros(given.q_THD.shape[:2])
    return column_sums(given.q_THD, given.keys, lse_TH, scale=given.scale, causal=given.causal)


def _sparse(case: Case) -> object:
    given = arguments(case, _CPU)
    chosen = drawn_lists(case, 64, _CPU)
    return sparse_prefill(given.q_THD, given.keys, chosen, scale=given.scale, causal=given.causal)


SUMS: dict[str, Callable[[], object]] = {
    f"sums {case.name}": partial(_sums, case) for case in SERVED
}
CHOSEN: dict[str, Callable[[], object]] = {
    f"chosen {case.name}": partial(_sparse, case) for case in SERVED
}
LAUNCHES: dict[str, Callable[[], object]] = {**SUMS, **CHOSEN}
