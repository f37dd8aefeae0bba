"""A call goes to the kernel that can serve it and was measured to be fastest."""

import pytest
import torch
from kvcluster_kernels import prefill_gluon
from kvcluster_kernels.prefill_arguments import Causal, Keys

from kvcluster.attention import kernel_choice
from kvcluster.attention.kernel_choice import (
    SPEEDS,
    Prefill,
    prefill_choice,
    reason_against_pipelined,
)
from kvcluster.attention.kernel_report import DIMS, prefill_lines

CPU = torch.device("cpu")


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_gluon, "is_available", lambda _device: True)
    monkeypatch.setattr(kernel_choice, "num_processors", lambda _device: 132)


def call(dim: int, *, num_tokens: int = 4096) -> tuple[torch.Tensor, Keys]:
    q_THD = torch.empty(num_tokens, 8, dim, dtype=torch.bfloat16)
    k_KSD = torch.empty(2, 128, dim, dtype=torch.bfloat16)
    return q_THD, Keys.in_line(k_KSD, k_KSD)


@pytest.mark.parametrize(("dim", "is_causal"), SPEEDS)
def test_the_faster_kernel_is_chosen(dim: int, is_causal: bool, on_hopper: None) -> None:
    speeds = SPEEDS[dim, is_causal]

    choice = prefill_choice(*call(dim), causal=Causal() if is_causal else None)

    assert speeds[choice] == max(speeds.values())


@pytest.mark.parametrize(
    ("dim", "causal", "softcap", "words"),
    [
        (96, None, None, "heads of 96"),
        (128, Causal(window=7), None, "window"),
        (128, None, 5.0, "softcap"),
    ],
)
def test_what_the_pipelined_kernel_cannot_do_is_done_by_the_portable_one(
    dim: int, causal: Causal | None, softcap: float | None, words: str, on_hopper: None
) -> None:
    q_THD, keys = call(dim)

    reason = reason_against_pipelined(q_THD, keys, causal=causal, softcap=softcap)

    assert reason is not None
    assert words in reason
    assert prefill_choice(q_THD, keys, causal=causal, softcap=softcap) is Prefill.PORTABLE


def test_few_rows_go_to_the_kernel_that_splits_keys(on_hopper: None) -> None:
    assert prefill_choice(*call(128, num_tokens=64)) is Prefill.PORTABLE


def test_a_report_has_a_line_for_every_head_size_with_speeds_or_a_reason(on_hopper: None) -> None:
    lines = prefill_lines(CPU)

    assert len(lines) == 3 * len(DIMS)
    pipelined, portable = SPEEDS[128, False].values()
    measured = f"pipelined (pipelined {pipelined}, portable {portable}"
    assert lines["prefill D128 full"].startswith(measured)
    assert "not pipelined: heads of 96" in lines["prefill D96 causal"]


def test_without_a_hopper_gpu_the_reason_is_the_gpu() -> None:
    assert prefill_lines(CPU)["prefill D64 full"].endswith("it is written for Hopper GPUs")
