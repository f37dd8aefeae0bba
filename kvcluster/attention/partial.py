"""The one rule that lets attention be split over ranks, blocks and ring steps.

Shape letters: P partials, T query tokens, H query heads, D value dimension.
"""

import math
from collections.abc import Sequence
from functools import reduce
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
    def room(cls, num_tokens: int, num_heads: int, value_dim: int, like: Tensor) -> "Partial":
        """Buffers for a partial that comes from another rank."""
        shape = (num_tokens, num_heads)
        return cls(
            torch.empty(*shape, value_dim, dtype=torch.float32, device=like.device),
            torch.empty(shape, dtype=torch.float32, device=like.device),
        )

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
    return reduce(_merge_two, partials)


def _merge_two(one: Partial, other: Partial) -> Partial:
    # exp(b) / (exp(a) + exp(b)) is sigmoid(b - a). Nobody saw a key: -inf minus -inf is NaN, and
    # one NaN poisons the rest of the ring.
    share_TH = torch.sigmoid(other.lse_TH - one.lse_TH.clamp_min(_LOWEST))
    return Partial(
        torch.lerp(one.out_THD, other.out_THD, share_TH[..., None]),
        torch.logaddexp(one.lse_TH, other.lse_TH),
    )


def merge_sinks(partial: Partial, sinks_H: Tensor) -> Partial:
    """Add one learned logit per head to the denominator. Once per query, after all merges.

    A sink is a key whose value is zero (gpt-oss); adding it on every rank would count it twice.
    """
    sink = Partial(
        torch.zeros_like(partial.out_THD),
        sinks_H.to(torch.float32).expand_as(partial.lse_TH),
    )
    return merge(partial, sink)


def concatenate(partials: Sequence[Partial]) -> Partial:
    """Partials of different rows, one after another."""
    if len(partials) == 1:
        return partials[0]
    return Partial(
        torch.cat([partial.out_THD for partial in partials]),
        torch.cat([partial.lse_TH for partial in partials]),
    )
