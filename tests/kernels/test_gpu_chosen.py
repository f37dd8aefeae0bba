"""The cases of the interpreter, and larger ones, with kernels compiled for the GPU that choose keys
and that read chosen ones."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.chosen_launches import SERVED
from tests.kernels.prefill_cases import Case
from tests.kernels.test_column_sums import CASES as SUM_CASES
from tests.kernels.test_column_sums import check as check_sums
from tests.kernels.test_sparse_prefill import CASES as CHOSEN_CASES
from tests.kernels.test_sparse_prefill import check as check_chosen

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", SUM_CASES, ids=lambda case: case.name)
def test_sums(case: Case, gpu: torch.device) -> None:
    check_sums(case, gpu)


@pytest.mark.parametrize("case", CHOSEN_CASES, ids=lambda case: case.name)
def test_chosen_blocks(case: Case, gpu: torch.device) -> None:
    check_chosen(case, gpu)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_sums_of_many_keys(case: Case, gpu: torch.device) -> None:
    check_sums(replace(case, num_keys=2_000), gpu)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_chosen_blocks_of_many(case: Case, gpu: torch.device) -> None:
    check_chosen(replace(case, num_keys=2_000), gpu, 64)
