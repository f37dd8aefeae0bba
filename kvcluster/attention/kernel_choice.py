"""Which prefill kernel serves a call: of those that can, the one that was measured to be fastest.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension.
"""

from enum import StrEnum
from typing import Final

import torch
from kvcluster_kernels import prefill_gluon
from kvcluster_kernels.paging import num_processors
from kvcluster_kernels.prefill_arguments import Causal, Keys
from torch import Tensor


class Prefill(StrEnum):
    """The prefill kernels."""

    PIPELINED = "pipelined"
    """`prefill_gluon`."""
    PORTABLE = "portable"
    """`prefill_tl`."""


SPEEDS: Final[dict[tuple[int, bool], dict[Prefill, float]]] = {
    (128, False): {Prefill.PIPELINED: 686, Prefill.PORTABLE: 502},
    (128, True): {Prefill.PIPELINED: 687, Prefill.PORTABLE: 481},
    (64, False): {Prefill.PIPELINED: 561, Prefill.PORTABLE: 434},
    (64, True): {Prefill.PIPELINED: 543, Prefill.PORTABLE: 472},
}
"""TFLOP/s by head size and whether the call is causal: 32K rows over 32K keys of 32 / 8 heads in
bfloat16 on an H100, `kvcluster bench kernels --suite prefill`, 2026-11-23; those of the portable
kernel are of a later run, in which the copy engine fetched its keys. A head size that is not here
has the portable kernel alone.

FlashAttention 3 (700, 696, 538, 553 there) and cuDNN (620, 599, 466, 470 in another run) are no
candidates: they round what they give to bfloat16, and a partial that is merged must not be."""

_PIPELINED_ROWS: Final = 128
"""Rows of a program of the pipelined kernel, or more."""


def prefill_choice(
    q_THD: Tensor, keys: Keys, *, causal: Causal | None = None, softcap: float | None = None
) -> Prefill:
    """The kernel of this call."""
    if reason_against_pipelined(q_THD, keys, causal=causal, softcap=softcap) is None:
        speeds = SPEEDS[q_THD.shape[2], causal is not None]
        return max(speeds, key=lambda kernel: speeds[kernel])
    return Prefill.PORTABLE


def reason_against_pipelined(
    q_THD: Tensor, keys: Keys, *, causal: Causal | None = None, softcap: float | None = None
) -> str | None:
    """Why the pipelined kernel is no candidate for this call; None: it is one."""
    device = q_THD.device
    if not prefill_gluon.is_available(device):
        return _reason_against_device(device)
    reason = prefill_gluon.reason_against(q_THD, keys, causal=causal, softcap=softcap)
    if reason is not None:
        return reason
    num_programs = -(-q_THD.shape[0] // _PIPELINED_ROWS) * q_THD.shape[1]
    if num_programs < num_processors(device):
        return f"{q_THD.shape[0]} rows give work to {num_programs} of the GPU's processors"
    return None


def _reason_against_device(device: torch.device) -> str:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "it is written for Hopper GPUs"
    return "it is written for Triton 3.6"
