"""Array codec `Float8`: e4m3 floats under one scale per block and KV head.

Stored x is scale * value, with `values` e4m3fn and `scale` float32. A float format keeps its
relative precision over 15 octaves, so a scale per channel would only cost more: one per head
multiplies the block's scores (keys) or its partial output (values) once. The scale is a power of
two, which loses nothing and makes a second encoding change nothing.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcluster.codec.array import BlockShape, Plane
from kvcluster.codec.checks import check_planes, shape_of_blocks, shape_of_stored
from kvcluster.codec.rounding import power_of_two_at_least, quotient

_MAX_VALUE = torch.finfo(torch.float8_e4m3fn).max
# The largest float32 with a mantissa of 3 bits: what is larger could round up to infinity.
_MAX_NUMBER = 1.875 * 2.0**127


@dataclass(frozen=True)
class Float8:
    """8 bits an element. Relative error at most 1/16 for all but a head's smallest numbers."""

    transposed: bool = False
    """Store [K, D, S], tokens contiguous, as kernels read values; else [K, S, D]."""

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        num_heads, num_tokens, dim = shape
        stored = (dim, num_tokens) if self.transposed else (num_tokens, dim)
        return (
            Plane("values", (num_heads, *stored), torch.float8_e4m3fn),
            Plane("scale", (num_heads,), torch.float32),
        )

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        shape_of_blocks(x_BKSD, positions_BS)
        x = x_BKSD.float().clamp(-_MAX_NUMBER, _MAX_NUMBER)
        scale_BK = power_of_two_at_least(quotient(x.abs().amax(dim=(2, 3)), _MAX_VALUE))
        # e4m3fn has no infinity: what rounds above its maximum would become NaN.
        values = (x / scale_BK[..., None, None]).clamp(-_MAX_VALUE, _MAX_VALUE)
        stored = values.transpose(2, 3) if self.transposed else values
        return stored.to(torch.float8_e4m3fn).contiguous(), scale_BK

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        values = planes[0].transpose(2, 3) if self.transposed else planes[0]
        check_planes(planes, self.planes(shape_of_stored(values)), positions_BS)
        return values.float().contiguous() * planes[1][..., None, None]
