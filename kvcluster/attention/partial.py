"""The one rule that lets attention be split over ranks, blocks and ring steps.

Shape letters: P partials, T query tokens, H query heads, D value dimension.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_LOWEST = torch.finfo(torch.float32).min


class Partial(NamedTuple):
    """Attention over some of the keys. Merging the partials of all keys gives exact attention."""

    out_THD: Tensor
    """Softmax-weighted values, float32; zero where no key was visible."""
    lse_TH: Tensor
    """Log-sum-exp of the scaled logits, natural log, float32; -inf where no key was visible."""

    @classmethod
    def empty(cls, num_tokens: int, num_heads: int, value_dim: int, like: Tensor) -> "Partial":
        """The identity of `merge`: no key seen."""
        out_THD = torch.zeros(
            num_tokens, num_heads, value_dim, dtype=torch.float32, device=like.device
        )
        lse_TH = torch.full(
            (num_tokens, num_heads), -math.inf, dtype=torch.float32, device=like.device
        )
        return cls(out_THD, lse_TH)


def merge(*partials: Partial) -> Partial:
    """Exact attention over the keys of all partials together; no two may share a key.

    Associative and commutative up to rounding (Milakov and Gimelshein 2018, online softmax).
    """
    if len(partials) == 1:
        return partials[0]
    lse_PTH = torch.stack([partial.lse_TH for partial in partials])
    lse_TH = torch.logsumexp(lse_PTH, dim=0)
    # Nobody saw a key: -inf minus -inf is NaN, and one NaN poisons the rest of the ring.
    weights_PTH = torch.exp(lse_PTH - lse_TH.clamp_min(_LOWEST))
    out_THD = weights_PTH[0, ..., None] * partials[0].out_THD
    for weight_TH, partial in zip(weights_PTH[1:], partials[1:], strict=True):
        out_THD.addcmul_(weight_TH[..., None], partial.out_THD)
    return Partial(out_THD, lse_TH)


def merge_sinks(partial: Partial, sinks_H: Tensor) -> Partial:
    """Add one learned logit per head to the denominator. Once per query, after all merges.

    A sink is a key whose value is zero (gpt-oss); adding it on every rank would count it twice.
    """
    sink = Partial(
        torch.zeros_like(partial.out_THD),
        sinks_H.to(torch.float32).expand_as(partial.lse_TH),
    )
    return merge(partial, sink)
