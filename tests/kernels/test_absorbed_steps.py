"""Steps of multi-head latent attention through the kernel for absorbed queries."""

from dataclasses import replace

import pytest
import torch

from kvcluster.attention import kernel_rows
from tests.kernels.test_latent_steps import counted
from tests.kernels.test_steps import (
    DEFAULT,
    EXACT_ATOL,
    InterpretedAttention,
    in_torch,
    outputs,
)

LATENT = replace(DEFAULT, dim=48, latent_dim=32)
"""Latents of 32 numbers and rotary keys of 16."""


@pytest.mark.timeout(300)
def test_a_step_of_latent_attention_is_the_step_in_torch(
    monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    calls = counted(monkeypatch, kernel_rows, "decode_absorbed")

    by_kernels = outputs(("exact", "int8"), InterpretedAttention, LATENT)

    plain = outputs(("exact", "int8"), in_torch, LATENT)
    assert len(calls) > 0
    assert by_kernels.keys() == plain.keys()
    for call, out_THD in plain.items():
        torch.testing.assert_close(by_kernels[call], out_THD, rtol=0, atol=EXACT_ATOL)
