"""Retention `window`: the first block and the latest tokens (StreamingLLM, arXiv 2309.17453).

By whole blocks: a query in block j reads block 0 and the blocks after j - recent / block_size, its
own included. Keys keep the rotation of their own position. The paper counts positions anew inside
its cache, to go beyond the length that the model was trained for; here a sequence never does.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvcluster.retention.base import Need


@dataclass(frozen=True, kw_only=True)
class WindowRetention:
    """Keeps what is first and what is latest."""

    name: ClassVar[str] = "window"
    needs: ClassVar[Need] = Need.NOTHING

    recent: int
    """Tokens: whole blocks, the one that is being filled included."""
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.recent < self.block_size or self.recent % self.block_size:
            raise ValueError(
                "recent must be a multiple of the block size and at least one block: give "
                f"{self.block_size} or a multiple of it, not {self.recent}"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks that a query reads beside the first one."""
        return self.recent // self.block_size

    def dropped_blocks(self, num_tokens: int) -> range:
        """The blocks that no query from position `num_tokens` on reads, in any layer or head."""
        first_read = num_tokens // self.block_size - self.num_blocks + 1
        return range(1, max(1, first_read))

    def num_held(self, num_tokens: int) -> int:
        """See `RetentionPolicy`."""
        return num_tokens - len(self.dropped_blocks(num_tokens - 1)) * self.block_size
