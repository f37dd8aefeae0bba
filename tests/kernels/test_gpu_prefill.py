"""The prefill kernels, compiled, against their twin in float64 on a GPU: pytest -m gpu."""

import math

import pytest
import torch
from kvcluster_kernels import prefill_gluon, prefill_tl
from kvcluster_kernels.merge import merge, merge_reference
from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention
from kvcluster_kernels.prefill_gluon import Pipeline

from tests.kernels.prefill_cases import Arguments, Case, arguments, assert_within_rounding
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

pytestmark = pytest.mark.gpu


def weight_unit(dtype: torch.dtype) -> float:
    """What rounding the weights to the dtype of the values does to them, relative."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def available(gpu: torch.device) -> None:
    if not prefill_gluon.is_available(gpu):
        pytest.skip("the pipelined kernel is for Hopper and Triton 3.6")


@pytest.mark.parametrize("case", PORTABLE, ids=lambda case: case.name)
def test_the_portable_kernel_gives_what_the_definition_gives(case: Case, gpu: torch.device) -> None:
    given = arguments(case.scaled(FACTOR), gpu)

    found = prefill_tl.prefill(given.q_THD, given.keys, **given.rules(), num_splits=case.num_splits)

    assert_within_rounding(found, given, weight_unit=weight_unit(case.dtype))


@pytest.mark.parametrize("case", COPIED, ids=lambda case: case.name)
def test_keys_that_the_copy_engine_fetches(case: Case, gpu: torch.device) -> None:
    given = arguments(case, gpu)

    found = prefill_tl.prefill(given.q_THD, given.keys, **given.rules(), num_splits=case.num_splits)

    assert_within_rounding(found, given, weight_unit=weight_unit(case.dtype))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", PIPELINED, ids=lambda case: case.name)
def test_the_pipelined_kernel_gives_what_the_definition_gives(
    case: Case, dim: int, gpu: torch.device
) -> None:
    available(gpu)
    case = shaped(case, dim)
    given = arguments(case, gpu)

    found = pipelined(given)

    assert_within_rounding(found, given, weight_unit=weight_unit(case.dtype))


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
@pytest.mark.parametrize("case", PIPELINED[-2:], ids=lambda case: case.name)
def test_a_pipeline_changes_nothing_but_rounding(
    case: Case, pipeline: Pipeline, gpu: torch.device
) -> None:
    available(gpu)
    given = arguments(shaped(case, dim_for(pipeline)), gpu)

    found = pipelined(given, pipeline)

    assert_within_rounding(found, given, weight_unit=weight_unit(torch.bfloat16))


@pytest.mark.parametrize("dim", [64, 128])
def test_the_pipelined_kernel_is_the_same_each_time(dim: int, gpu: torch.device) -> None:
    """A race between the groups of a program would show in some run."""
    available(gpu)
    case = Case(name="long", num_tokens=1000, num_keys=9001, num_heads=8, num_kv_heads=2)
    given = arguments(shaped(case, dim), gpu)

    first, *others = [pipelined(given) for _ in range(20)]

    assert all(torch.equal(other.out_THD, first.out_THD) for other in others)
    assert all(torch.equal(other.lse_TH, first.lse_TH) for other in others)
    assert_within_rounding(first, given, weight_unit=weight_unit(torch.bfloat16))


def test_queries_and_keys_may_be_views_of_a_projection(gpu: torch.device) -> None:
    """As a model gives them: one tensor of all heads, keys token by token."""
    available(gpu)
    torch.manual_seed(0)
    qkv_TGD = torch.randn(700, 8 + 2 + 2, 128, device=gpu).to(torch.bfloat16)
    q_THD, k_TKD, v_TKD = qkv_TGD.split([8, 2, 2], dim=1)
    keys = Keys.in_line(k_TKD.transpose(0, 1), v_TKD.transpose(0, 1))
    given = Arguments(
        q_THD=q_THD, keys=keys, scale=0.1, causal=Causal(), softcap=None, sinks_H=None, carry=None
    )

    found = pipelined(given)

    assert_within_rounding(found, given, weight_unit=weight_unit(torch.bfloat16))


def test_partials_merge_to_what_the_definition_gives(gpu: torch.device) -> None:
    torch.manual_seed(0)
    partials = [
        PartialAttention(torch.randn(301, 6, 96, device=gpu), torch.randn(301, 6, device=gpu) * 10)
        for _ in range(11)
    ]
    for index, partial in enumerate(partials):
        partial.out_THD[index::3] = 0.0
        partial.lse_TH[index::3] = -math.inf

    found = merge(partials)

    right = merge_reference([PartialAttention(x.double(), y.double()) for x, y in partials])
    # Exponents of at most 60 are rounded by as many units; values are at most about 5.
    error = 1000 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.out_THD.double(), right.out_THD, rtol=0, atol=error)
    torch.testing.assert_close(found.lse_TH.double(), right.lse_TH, rtol=error, atol=error)
