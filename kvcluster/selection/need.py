"""What a selection knows of a block's keys, and what that takes. No torch: the engine counts it."""

from enum import StrEnum
from typing import Final

from kvcluster.types import LayerGeometry

INDEX_BYTES: Final = 8
"""Of the number of a block, beside what is known of its keys."""
_MEAN_BYTES: Final = 4


class Need(StrEnum):
    """What a method looks at to compare blocks."""

    NOTHING = "nothing"
    """Positions alone."""
    BOUNDS = "bounds"
    """The least and the largest number of a block's keys in each dimension."""
    MEANS = "means"
    """The mean of a block's keys."""


def summary_bytes(needs: Need, layer: LayerGeometry, bytes_per_element: int) -> int:
    """What is kept of one block in one layer."""
    numbers = layer.num_kv_heads * layer.key_dim
    if needs is Need.BOUNDS:
        return INDEX_BYTES + 2 * numbers * bytes_per_element
    return INDEX_BYTES + numbers * _MEAN_BYTES if needs is Need.MEANS else 0
