"""Calls of the kernels that choose keys, and read chosen ones, whose code is looked at on machines
without a GPU (`launches`)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from kvcluster_kernels.block_bounds import BoundsOfRows, largest_bounds, largest_bounds_of_rows
from kvcluster_kernels.chosen_blocks import Candidates, Pools, pick, row_tables
from kvcluster_kernels.column_sums import column_sums
from kvcluster_kernels.prefill_arguments import Causal
from kvcluster_kernels.sparse_prefill import SparseTiles, sparse_prefill

from kvcluster.bench.kernel_chosen import TILES
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


def _each_head(case: Case) -> object:
    """Lists for each query head, as `estimated` has them."""
    given = arguments(case, _CPU)
    chosen = drawn_lists(case, 64, _CPU, case.num_heads)
    return sparse_prefill(given.q_THD, given.keys, chosen, scale=given.scale, causal=given.causal)


def _picks(num_blocks: int) -> object:
    flags_JB = torch.zeros(128, num_blocks, dtype=torch.uint8)
    num_J = torch.zeros(128, dtype=torch.int32)
    return pick(torch.zeros(32, 128, num_blocks - 1), Candidates(flags_JB, num_J))


def _tables(num_blocks: int) -> object:
    """Of a row of decode, which `quest` picks blocks for."""
    ids_2B = torch.zeros(2, num_blocks, dtype=torch.int32)
    flags_JB = torch.zeros(1, num_blocks, dtype=torch.uint8)
    numbers_1 = torch.zeros(1, dtype=torch.int32)
    pools = Pools(*ids_2B, 16, 64, 8, 8)
    scores = torch.zeros(8, 1, num_blocks)
    return row_tables(scores, Candidates(flags_JB, numbers_1), numbers_1, pools)


def _bounds(dim: int) -> object:
    low_KBD, high_KBD = torch.zeros(2, 8, 2048, dim, dtype=torch.bfloat16)
    return largest_bounds(torch.zeros(1, 32, dim, dtype=torch.bfloat16), low_KBD, high_KBD, 0.1)


def _bounds_of_rows(dim: int) -> object:
    places_2R = torch.zeros(2, 4, dtype=torch.int64)
    bounds = BoundsOfRows(*places_2R, torch.zeros(4, dtype=torch.int32), 8)
    q_RHD = torch.zeros(4, 32, dim, dtype=torch.bfloat16)
    return largest_bounds_of_rows(q_RHD, bounds, width=2048, scale=0.1)


def _tiled(case: Case, tiles: SparseTiles) -> object:
    given = arguments(case, _CPU)
    chosen = drawn_lists(case, 64, _CPU)
    rules = {"scale": given.scale, "causal": given.causal}
    return sparse_prefill(given.q_THD, given.keys, chosen, tiles=tiles, **rules)


TILED: dict[str, Callable[[], object]] = {
    f"{case.name} {tiles.block_m} rows, {tiles.num_stages} stages {tiles.is_ahead}": partial(
        _tiled, case, tiles
    )
    for case in SERVED[:2]
    for tiles in TILES
}
"""All that are timed, not only those that are chosen."""
HEADS: dict[str, Callable[[], object]] = {
    f"each head {case.name}": partial(_each_head, case) for case in SERVED
}
PICKS: dict[str, Callable[[], object]] = {
    "picks of 32K tokens": partial(_picks, 512),
    "picks of 1M tokens": partial(_picks, 1 << 14),
    "tables of 128K tokens": partial(_tables, 1 << 11),
    "tables of 1M tokens": partial(_tables, 1 << 14),
    "bounds head 128": partial(_bounds, 128),
    "bounds head 64": partial(_bounds, 64),
    "bounds of rows, head 128": partial(_bounds_of_rows, 128),
    "bounds of rows, head 64": partial(_bounds_of_rows, 64),
}
"""What picks blocks, which multiplies nothing."""
LAUNCHES: dict[str, Callable[[], object]] = {**SUMS, **CHOSEN, **TILED, **HEADS, **PICKS}
