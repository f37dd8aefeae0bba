"""Array codec `ExactArray`: the numbers as the model gave them.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcluster.codec.array import BlockShape, Plane
from kvcluster.codec.checks import check_planes, shape_of_blocks, shape_of_stored

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Those that a model may compute and a cache keep K and V in, by `ModelSpec.dtype`."""


@dataclass(frozen=True)
class ExactArray:
    """One plane `x` [K, S, D]; nothing is lost where `dtype` is the model's."""

    dtype: torch.dtype
    """float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype}")

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        return (Plane("x", tuple(shape), self.dtype),)

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        shape_of_blocks(x_BKSD, positions_BS)
        limit = torch.finfo(self.dtype).max
        stored = x_BKSD.float().clamp(-limit, limit).to(self.dtype)
        return (stored.clone(memory_format=torch.contiguous_format),)

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        check_planes(planes, self.planes(shape_of_stored(planes[0])), positions_BS)
        return planes[0].to(torch.float32, copy=True)
