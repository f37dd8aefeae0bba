"""Recorded encoding writes what encoding writes, and measures what it measures."""

import pytest
import torch

from tests.kernels import encode_step_cases
from tests.kernels.test_steps import DEFAULT, InterpretedAttention


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("policies", "num_runs"),
    [
        (("int4", "exact"), 1),
        (("int8", "int4:scale_bits=8"), 2),
        (("fp8", "int8"), 2),
        # Values that no kernel writes are encoded as they are defined.
        (("int4:values=rotated4", "int8"), 1),
    ],
    ids=str,
)
def test_blocks_that_single_rows_fill_are_encoded_as_they_are_defined(
    policies: tuple[str, ...],
    num_runs: int,
    monkeypatch: pytest.MonkeyPatch,
    interpreted: torch.device,
) -> None:
    assert num_runs == encode_step_cases.check(
        policies, InterpretedAttention, DEFAULT, 5, monkeypatch
    )
