"""Which blocks of a sequence with a codec are read exact, besides the first one. Torch-free: the
engine frees by it what the ranks encode by it.
"""

from dataclasses import dataclass
from typing import Final

from kvcluster.types import Policy

_IN_PLACE: Final = ("full", "window")
"""Retentions under which all layers hold the same tokens in the same blocks."""


@dataclass(frozen=True, slots=True)
class ExactRegion:
    """A row reads exact its own block and some before it: a matter of its position alone."""

    recent_blocks: int = 0
    """Blocks before a row's own that it reads exact at least."""
    step_blocks: int | None = None
    """Blocks are encoded so many at a time, those of a step from a multiple of it on, and rows that
    are computed together lie in one step. So no row reads encoded what was computed beside it:
    a codec may need more of a block than the layer in hand has. None: each block is encoded when
    it is old enough, and chunks may be cut anywhere."""

    def __post_init__(self) -> None:
        if self.recent_blocks < 0 or (self.step_blocks is not None and self.step_blocks < 1):
            raise ValueError(f"want recent_blocks >= 0 and step_blocks >= 1, got {self}")

    def first_block(self, block: int) -> int:
        """The first block that rows of this one read exact, but for block 0."""
        step = self.step_blocks or 1
        return max(0, block // step * step - self.recent_blocks)

    @property
    def most_blocks(self) -> int:
        """Most whole blocks that are exact between steps, without block 0."""
        return self.recent_blocks + (self.step_blocks or 1) - 1

    def chunk_end(self, start: int, end: int, block_size: int) -> int:
        """`end`, or before it where the last position lies that `start` may be computed with."""
        if self.step_blocks is None:
            return end
        step_tokens = self.step_blocks * block_size
        return min(end, (start // step_tokens + 1) * step_tokens)


def check_in_steps(policy: Policy) -> None:
    """Raises: ValueError, saying what to give, for a policy whose other parts cannot go with layers
    that are written together."""
    retention = policy.retention.partition(":")[0]
    if retention not in _IN_PLACE:
        raise ValueError(
            f"{policy.codec} writes the same tokens of several layers as one, and {retention} "
            f"keeps other tokens in each layer: combine it with {' or '.join(_IN_PLACE)}, or give "
            "layers=1"
        )
    if policy.selection != Policy().selection:
        raise ValueError(
            f"{policy.codec} writes several layers as one, which is not offered together with a "
            f"selection ({policy.selection}): leave that out, or give layers=1"
        )
