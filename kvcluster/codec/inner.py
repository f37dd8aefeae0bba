"""Arrays read in an inner form, from which attention comes out the same with less work.

A dot product with a key may be taken in any orthogonal basis, and a weighted sum of values in any
basis at all: what has to be done to every stored number can be done to the query, or to the sum.
The definition is `decode` followed by attention; this equals it up to float32 rounding. It is for
single queries: over the many rows of a prefill chunk, decoding once costs less.

Shape letters: B blocks, J heads as stored, S tokens of a block, C inner dimension, T query tokens,
H query heads, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from kvcluster.codec.array import ArrayCodec


@runtime_checkable
class InnerKeys(Protocol):
    """An array codec with q . k = fold(q) . z for every key k and its inner form z."""

    def inner(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        """z_BJSC of encoded blocks, float32, new memory in any layout; J are the KV heads."""
        ...

    def fold(self, q_THD: Tensor) -> Tensor:
        """q_THC, float32."""
        ...


@runtime_checkable
class InnerValues(Protocol):
    """An array codec with sum(w v) = expand(sum(w z)) for weights w that add up to 1."""

    def inner(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        """z_BJSC of encoded blocks, float32, new memory in any layout. J are the KV heads, or 1:
        all share it."""
        ...

    def expand(self, out_THC: Tensor) -> Tensor:
        """out_THD, float32. A row that has seen no key must not be expanded: it has no sum."""
        ...


def inner_keys(codec: ArrayCodec) -> InnerKeys:
    """The codec's own inner form of keys, or the keys themselves."""
    return codec if isinstance(codec, InnerKeys) else Decoded(codec)


def inner_values(codec: ArrayCodec) -> InnerValues:
    """The codec's own inner form of values, or the values themselves."""
    return codec if isinstance(codec, InnerValues) else Decoded(codec)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Keys or values themselves: the inner form of every codec."""

    codec: ArrayCodec

    def inner(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        return self.codec.decode(planes, positions_BS)

    def fold(self, q_THD: Tensor) -> Tensor:
        return q_THD.float()

    def expand(self, out_THC: Tensor) -> Tensor:
        return out_THC
