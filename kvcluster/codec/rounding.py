"""Float operations whose result no batch size, thread count or device can change.

Encoded blocks are shared by their bytes, so a sum whose order depends on the shape of the batch,
or a power that rounds differently in a vector's tail, may not be used to write them.
"""

import torch
from torch import Tensor

MAX_HALF = 65504.0
"""Largest finite float16."""


def half_at_least(x: Tensor) -> Tensor:
    """Smallest float16 that is not below float32 `x`, whose magnitude is at most `MAX_HALF`."""
    nearest = x.to(torch.float16)
    # The next float16 up has the next bit pattern, and below zero the one before.
    step = torch.where(nearest < 0, -1, 1).to(torch.int16)
    above = (nearest.view(torch.int16) + step).view(torch.float16)
    return torch.where(nearest.float() < x, above, nearest)


def half_at_most(x: Tensor) -> Tensor:
    """Largest float16 that is not above float32 `x`, whose magnitude is at most `MAX_HALF`."""
    return -half_at_least(-x)


def power_of_two_at_least(x: Tensor) -> Tensor:
    """Smallest normal power of two that is not below float32 `x`, which is 0 or more."""
    exponent = (x.view(torch.int32) + 0x7FFFFF) >> 23
    return (exponent.clamp(min=1) << 23).view(torch.float32)


def quotient(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once. A GPU multiplies by the reciprocal where the divisor is a
    number, and the last bit differs from a CPU's."""
    return x / torch.full_like(x, divisor)


def pairwise_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, added in halves: the same order for every shape."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x.squeeze(-1)
