"""Means over neighbouring tokens with a standard error that knows that neighbours are alike.

The tokens are cut into spans, and the spans' means are taken as independent (batch means).
"""

import math
from typing import Final

import msgspec
import torch
from torch import Tensor

SPAN_TOKENS: Final = 256


class Mean(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over tokens."""

    value: float
    standard_error: float | None
    """None for fewer than two spans."""


def mean_over_spans(x_T: Tensor, span_tokens: int = SPAN_TOKENS) -> Mean:
    """Mean of at least one token. A last, shorter span counts by its length.

    Raises: ValueError for no tokens.
    """
    if not len(x_T):
        raise ValueError("a mean of no tokens")
    x_T = x_T.double()
    value = float(x_T.mean())
    spans = torch.split(x_T, span_tokens)
    if len(spans) < 2:
        return Mean(value=value, standard_error=None)
    # The error of a ratio of sums over spans (Cochran 1977, section 6.3).
    squares = sum(float((span - value).sum()) ** 2 for span in spans)
    variance = squares * len(spans) / (len(spans) - 1)
    return Mean(value=value, standard_error=math.sqrt(variance) / len(x_T))
