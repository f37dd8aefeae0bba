"""Blocks are picked on a GPU as they are defined, and steps that choose give what they give in
torch."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels.chosen_blocks import Candidates, Pools, row_tables

from kvcluster.attention.implementation import implementation_for
from kvcluster.types import Policy
from tests.kernels.chosen_launches import SERVED
from tests.kernels.prefill_cases import Case
from tests.kernels.selected_cases import BLOCK_SPARSE, BOUNDED, ESTIMATED, QUEST, Sequences, compare
from tests.kernels.test_chosen_blocks import (
    check_bounds,
    check_bounds_of_rows,
    check_lists,
    check_picks,
    check_tables,
)
from tests.kernels.test_gpu_steps import ATOL, generated, in_kernels, tiny_llama
from tests.kernels.test_sparse_prefill import check as check_sparse
from tests.kernels.test_steps import Setting, in_torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("num_blocks", "short"), [(1, 0), (37, 1), (2048, 1), (5000, 0), (1 << 14, 1), (1 << 16, 1)]
)
@pytest.mark.parametrize("num_choosing", [1, 8])
def test_the_best_are_picked(
    num_choosing: int, num_blocks: int, short: int, gpu: torch.device
) -> None:
    check_picks(num_blocks, num_choosing, gpu, short=short)


@pytest.mark.parametrize("num_blocks", [37, 2048, 5000])
def test_lists_have_the_blocks_of_a_flag(num_blocks: int, gpu: torch.device) -> None:
    check_lists(num_blocks, gpu)


@pytest.mark.parametrize("has_encoded", [False, True])
@pytest.mark.parametrize("picks", [False, True])
@pytest.mark.parametrize(("num_choosing", "num_kv_heads"), [(1, 1), (8, 8), (32, 8)])
def test_tables_have_the_blocks_of_each_pool(
    num_choosing: int, num_kv_heads: int, picks: bool, has_encoded: bool, gpu: torch.device
) -> None:
    check_tables(num_choosing, num_kv_heads, gpu, picks=picks, has_encoded=has_encoded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_blocks", "dim"), [(1, 64), (37, 96), (2048, 128), (999, 256)])
def test_bounds_are_those_of_the_definition(
    num_blocks: int, dim: int, dtype: torch.dtype, gpu: torch.device
) -> None:
    check_bounds(num_blocks, dim, dtype, gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_bounds_of_sequences_are_found_where_they_are_said_to_be(
    dim: int, dtype: torch.dtype, gpu: torch.device
) -> None:
    check_bounds_of_rows(dim, dtype, gpu)


@pytest.mark.parametrize("num_lists", [1, 32])
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_lists_for_all_heads_and_for_each(case: Case, num_lists: int, gpu: torch.device) -> None:
    check_sparse(replace(case, num_keys=2_000), gpu, 64, num_lists)


def test_blocks_are_picked_without_waiting_for_the_gpu(gpu: torch.device) -> None:
    num_blocks = 2048
    flags_JB = torch.full((1, num_blocks), 5, dtype=torch.uint8, device=gpu)
    one_J = torch.full((1,), 63, dtype=torch.int32, device=gpu)
    ids_B = torch.arange(num_blocks, dtype=torch.int32, device=gpu)
    score_GJB = torch.rand(8, 1, num_blocks, device=gpu)
    arguments = (score_GJB, Candidates(flags_JB, one_J), one_J, Pools(ids_B, None, 16, 64, 8))
    want, _ = row_tables(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()

    with torch.cuda.graph(graph):
        captured, _ = row_tables(*arguments)

    graph.replay()
    assert torch.equal(captured.ends_R, want.ends_R)
    assert torch.equal(captured.blocks_RB[:, :63], want.blocks_RB[:, :63])


@pytest.mark.parametrize("dtype", list(ATOL), ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("selection", "codec"),
    [
        (QUEST, "exact"),
        (QUEST, "int4"),
        (QUEST, "int8:scale_bits=8"),
        (QUEST, "fp8"),
        (QUEST, "rotated3"),
        (QUEST, "int4:values=rotated3"),
        (QUEST, "latent:r=0.375,bits=4,values=rotated3,ranks=adaptive"),
        (BLOCK_SPARSE, "exact"),
        (BLOCK_SPARSE, "latent:r=0.5,bits=2,values=int4"),
        (ESTIMATED, "exact"),
        (ESTIMATED, "int4"),
        (BOUNDED, "rotated4"),
        (BOUNDED, "fp8"),
    ],
)
def test_a_step_that_chooses_is_the_step_in_torch(
    selection: str, codec: str, dim: int, dtype: torch.dtype, gpu: torch.device
) -> None:
    setting = Setting(gpu, dtype, dim, block_size=64)
    case = Sequences(selection, codec, (3, 4, 2.5), num_decoded=3, num_again=5, setting=setting)

    compare(case, implementation_for, in_torch, ATOL[dtype])


# As in `test_gpu_steps`: random weights turn a rounding into another token sooner or later.
@pytest.mark.parametrize(("codec", "num_output"), [("exact", 70), ("int8", 6), ("int4", 6)])
def test_a_model_that_chooses_gives_the_same_tokens_through_recorded_steps(
    codec: str, num_output: int, gpu: torch.device
) -> None:
    model = tiny_llama(gpu)
    policy = Policy(codec=codec, selection="quest:tokens=256,sinks=0,local=1")

    through_kernels = generated(model, policy, in_kernels, num_output)

    assert through_kernels == generated(model, policy, in_torch, num_output)


@pytest.mark.parametrize("selection", [QUEST, ESTIMATED])
def test_latent_attention_that_chooses_is_that_in_torch(selection: str, gpu: torch.device) -> None:
    setting = Setting(gpu, torch.bfloat16, 576, block_size=64, latent_dim=512)

    compare(Sequences(selection, setting=setting), implementation_for, in_torch, 4e-2)
