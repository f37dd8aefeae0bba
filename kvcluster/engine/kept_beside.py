"""What the ranks keep of a sequence beside the pages of the cache, counted without any tensor.

Retention by score keeps positions and sums of attention for each token of each KV head
(`retention.base.Marks`), a selection what it knows of each block's keys (`selection.need`). Both
are functions of how many tokens are computed, and concern the layers without a window that have K
and V of their own.
"""

from kvcluster.engine.survivor_table import group_by_score
from kvcluster.retention.offered import budgeted, recent_blocks
from kvcluster.selection.need import summary_bytes
from kvcluster.selection.offered import needs_of
from kvcluster.types import ModelSpec, Policy


class KeptBeside:
    """The bytes of one policy on one model, all ranks together.

    Raises: ValueError for arguments that do not fit the blocks.
    """

    def __init__(self, policy: Policy, spec: ModelSpec, block_size: int) -> None:
        self.group = group_by_score(spec.windows)
        """The KV group that is concerned; None: the model has windows throughout."""
        self._block_size = block_size
        self._retention = budgeted(policy.retention, block_size)
        self._recent_blocks = recent_blocks(policy.retention, block_size)
        storing = [spec.layers[index] for index in spec.storing_layers]
        layers = [layer for layer in storing if layer.window is None]
        self._num_heads = sum(layer.num_kv_heads for layer in layers)
        needs = needs_of(policy.selection)
        self._block_bytes = sum(
            summary_bytes(needs, layer, spec.bytes_per_element) for layer in layers
        )

    def num_bytes(self, num_tokens: int) -> int:
        """Between two steps, when so many tokens are computed."""
        marks = 0 if self._retention is None else self._retention.marks(num_tokens).num_bytes
        return self._num_heads * marks + self._block_bytes * self._num_known(num_tokens)

    def most_bytes(self, num_tokens: int) -> int:
        """At any time between two steps, until so many tokens are computed."""
        ends = {num_tokens}
        if self._retention is not None:
            # Sums of the open epoch are given up when it ends.
            last_end = self._retention.epoch_start(num_tokens)
            ends |= {max(0, last_end - 1), last_end}
        return max(map(self.num_bytes, ends))

    def _num_known(self, num_tokens: int) -> int:
        """Blocks that a selection knows something of: survivors' and those that are full."""
        size = self._block_size
        if self._retention is not None:
            epoch_start = self._retention.epoch_start(num_tokens)
            survivors = -(-self._retention.counts(epoch_start).kept // size)
            return survivors + (num_tokens - epoch_start) // size
        full = num_tokens // size
        return full if self._recent_blocks is None else min(full, self._recent_blocks)
