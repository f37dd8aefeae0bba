"""Which attention serves which calls on a GPU, and why not a faster one, for people."""

from typing import Final

import torch
from kvcluster_kernels.prefill_arguments import Causal, Keys

from kvcluster.attention.kernel_choice import (
    SPEEDS,
    Prefill,
    prefill_choice,
    reason_against_pipelined,
)

DIMS: Final = (64, 96, 128, 256)
_ROWS: Final = 4096
_HEADS: Final = (8, 2)
"""Of queries and of keys."""


def prefill_lines(device: torch.device) -> dict[str, str]:
    """By call, what serves a chunk of bfloat16 rows and what was measured."""
    lines = {}
    for dim in DIMS:
        for name, causal in (("full", None), ("causal", Causal()), ("window", Causal(window=1024))):
            lines[f"prefill D{dim} {name}"] = _line(device, dim, causal)
    return lines


def _line(device: torch.device, dim: int, causal: Causal | None) -> str:
    num_heads, num_kv_heads = _HEADS
    q_THD = torch.empty(_ROWS, num_heads, dim, dtype=torch.bfloat16, device=device)
    k_KSD = torch.empty(num_kv_heads, 128, dim, dtype=torch.bfloat16, device=device)
    keys = Keys.in_line(k_KSD, k_KSD)
    choice = prefill_choice(q_THD, keys, causal=causal)
    reason = reason_against_pipelined(q_THD, keys, causal=causal)
    if reason is not None:
        return f"{choice}; not {Prefill.PIPELINED}: {reason}"
    speeds = SPEEDS[dim, causal is not None]
    measured = ", ".join(f"{kernel} {speed:.0f}" for kernel, speed in speeds.items())
    return f"{choice} ({measured} TFLOP/s on an H100)"
