"""The protocol of an array codec: how the keys, or the values, of whole blocks are written.

A codec pairs two of them, one for keys and one for values. Everything that is stored of a block is
in its planes; a plane's bytes are documented in the file of the codec that writes it, because
kernels read them.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class BlockShape(NamedTuple):
    """Shape of the keys, or the values, of one block in one layer."""

    num_heads: int
    num_tokens: int
    dim: int


class Plane(NamedTuple):
    """One array of an encoded block."""

    name: str
    shape: tuple[int, ...]
    """For one block; encoded blocks have their number in front."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ArrayCodec(Protocol):
    """Pure functions between float arrays and planes. Blocks do not depend on each other."""

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        """The arrays that one block becomes. Raises: ValueError for a shape that cannot be
        encoded, saying which number must be a multiple of what."""
        ...

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        """Contiguous planes of float blocks (float32, bfloat16 or float16; computed in float32).

        `positions_BS`, int64, are the positions of the tokens: consecutive ones where all tokens
        are kept, ascending ones where only some are. The same input gives the same bytes, whatever
        other blocks are beside it.
        """
        ...

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        """x_BKSD in float32, new memory."""
        ...


def consecutive(starts_B: Tensor, num_tokens: int) -> Tensor:
    """positions_BS of blocks whose tokens follow one another."""
    return starts_B[:, None] + torch.arange(num_tokens, device=starts_B.device)
