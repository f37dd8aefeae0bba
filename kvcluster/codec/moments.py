"""Second moments of queries, keys and values, from which latent bases are fitted.

Sums are float64, in memory that grows with the width of a layer, not with the text.

Shape letters: T tokens, H query heads, K KV heads, D head dimension, F = K * D (all KV heads of a
layer side by side, head by head).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Mean of vectors, and their covariance around it, float64."""

    mean_F: Tensor
    covariance_FF: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerMoments:
    """What calibration knows of one layer."""

    num_tokens: int
    query_KDD: Tensor
    """Mean over tokens of the outer products of queries, not centred, summed over the query heads
    that read a KV head: how much an error of its keys matters. float64."""
    keys: Spread
    """Of keys before rotation."""
    values: Spread


class MomentSums:
    """Running sums over the tokens of one layer, on the CPU."""

    def __init__(self, num_kv_heads: int, key_dim: int, value_dim: int) -> None:
        key_width, value_width = num_kv_heads * key_dim, num_kv_heads * value_dim
        shapes = {
            "num_tokens": (),
            "query": (num_kv_heads, key_dim, key_dim),
            "key": (key_width,),
            "key_squares": (key_width, key_width),
            "value": (value_width,),
            "value_squares": (value_width, value_width),
        }
        self._sums = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()
        }

    @property
    def num_tokens(self) -> int:
        return int(self._sums["num_tokens"])

    def add(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Count tokens in. Keys and queries are as they are before rotation. Multiplies on the
        device of the tensors."""
        k_TF, v_TF = (x.detach().double().flatten(1) for x in (k_TKD, v_TKD))
        sums = self._sums
        sums["num_tokens"] += len(k_TKD)
        sums["key"] += k_TF.sum(0).cpu()
        sums["key_squares"] += (k_TF.T @ k_TF).cpu()
        sums["value"] += v_TF.sum(0).cpu()
        sums["value_squares"] += (v_TF.T @ v_TF).cpu()

        self.add_queries(q_THD)

    def add_queries(self, q_THD: Tensor, *, scale: float = 1.0) -> None:
        """Count in the queries that another layer has of the same tokens for the same keys.
        `scale`: that layer's factor on the logits, over this one's."""
        query_KDD = self._sums["query"]
        num_kv_heads, key_dim, _ = query_KDD.shape
        q_TKGD = q_THD.detach().double().reshape(len(q_THD), num_kv_heads, -1, key_dim)
        query_KDD += scale**2 * torch.einsum("tkgd,tkge->kde", q_TKGD, q_TKGD).cpu()

    def moments(self) -> LayerMoments:
        """Means of the sums so far. Raises: ValueError when no token was added."""
        num_tokens = self.num_tokens
        if not num_tokens:
            raise ValueError("want at least one token")
        means = {name: total / num_tokens for name, total in self._sums.items()}
        return LayerMoments(
            num_tokens=num_tokens,
            query_KDD=means["query"],
            keys=_centred(means["key"], means["key_squares"]),
            values=_centred(means["value"], means["value_squares"]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves, to keep them on disk and go on later with `load`."""
        return dict(self._sums)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over sums that `tensors` gave. Raises: ValueError when they are of another shape."""
        for name, total in self._sums.items():
            if name not in tensors or tensors[name].shape != total.shape:
                raise ValueError(f"want {name} of shape {list(total.shape)}")
            total.copy_(tensors[name])


def weighted_sum(sources: Sequence[LayerMoments], weights: Sequence[float]) -> LayerMoments:
    """Moments of a text mixed from the sources in these proportions, whatever their lengths."""
    shares = _shares(sources, weights)

    def mixed(parts: Sequence[Tensor]) -> Tensor:
        return sum((w * x for w, x in zip(shares, parts, strict=True)), torch.zeros_like(parts[0]))

    keys, values = (
        Spread(mixed([s.mean_F for s in spreads]), mixed([s.covariance_FF for s in spreads]))
        for spreads in _around_common_means(sources, shares)
    )
    return LayerMoments(
        num_tokens=sum(source.num_tokens for source in sources),
        query_KDD=mixed([source.query_KDD for source in sources]),
        keys=keys,
        values=values,
    )


def upper_bound(sources: Sequence[LayerMoments], weights: Sequence[float]) -> LayerMoments:
    """Moments that are at least each source's in every direction.

    A direction that matters in one source only (the digits of retrieval documents) is diluted in a
    sum of many; here it keeps its full size, so the error of a basis in any one source is at most
    what the spectrum of the bound says was cut off. `weights` move the common mean alone.
    """
    shares = _shares(sources, weights)
    keys, values = (
        Spread(spreads[0].mean_F, reduce(_larger, [s.covariance_FF for s in spreads]))
        for spreads in _around_common_means(sources, shares)
    )
    return LayerMoments(
        num_tokens=sum(source.num_tokens for source in sources),
        query_KDD=reduce(_larger, [source.query_KDD for source in sources]),
        keys=keys,
        values=values,
    )


def _centred(mean_F: Tensor, squares_FF: Tensor) -> Spread:
    return Spread(mean_F, squares_FF - torch.outer(mean_F, mean_F))


def _shares(sources: Sequence[LayerMoments], weights: Sequence[float]) -> list[float]:
    if not sources or len(weights) != len(sources) or min(weights) <= 0:
        raise ValueError(f"want a positive weight for each of {len(sources)} sources (at least 1)")
    return [weight / sum(weights) for weight in weights]


def _around_common_means(
    sources: Sequence[LayerMoments], shares: Sequence[float]
) -> tuple[list[Spread], list[Spread]]:
    """Each source's spread of keys, and of values, around the mean over all sources."""

    def moved(spreads: Sequence[Spread]) -> list[Spread]:
        mean_F = torch.stack([w * s.mean_F for w, s in zip(shares, spreads, strict=True)]).sum(0)
        return [
            Spread(mean_F, s.covariance_FF + torch.outer(s.mean_F - mean_F, s.mean_F - mean_F))
            for s in spreads
        ]

    return moved([s.keys for s in sources]), moved([s.values for s in sources])


def _larger(a: Tensor, b: Tensor) -> Tensor:
    """The matrix (a + b + |a - b|) / 2, which is a or b where one is the larger in all directions,
    and is never below either (in the order of positive semi-definite matrices)."""
    values, vectors = torch.linalg.eigh(a - b)
    larger: Tensor = a + b + (vectors * values.abs()[..., None, :]) @ vectors.transpose(-1, -2)
    return larger / 2
