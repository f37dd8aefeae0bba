"""What a sequence no longer needs once a step is planned: its blocks are free for the next plan."""

from collections.abc import Sequence

from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.partition import Partition
from kvcluster.cache.partitions import CachePartitions
from kvcluster.engine.plan import Release, SequenceStep
from kvcluster.engine.request import Request
from kvcluster.types import EXACT


class BlockReleases:
    """Frees, through the partitions, what no row after a step reads."""

    def __init__(
        self,
        partitions: CachePartitions,
        windows: Sequence[int | None],
        *,
        block_size: int,
    ) -> None:
        self._partitions = partitions
        self._windows = windows
        self._block_size = block_size

    def after_step(self, part: SequenceStep, request: Request) -> list[Release]:
        """Free what the planned part leaves unread. The ranks must be told of the result before
        any step in which the blocks have another user."""
        table = request.table
        if table is None or request.sequence is None:
            return []
        partition = self._partitions.of(request.spec.tenant)
        self._release_encoded(part, table, partition)
        self._release_encoded_survivors(part, request, partition)
        return self._release_unread(request, table, partition)

    def _release_encoded(self, part: SequenceStep, table: BlockTable, partition: Partition) -> None:
        """Free the exact blocks that no later row reads: the ranks encode them in this step."""
        if table.codec == EXACT:
            return
        region = partition.exact_region(table.codec)
        first, last = (
            region.first_block(position // self._block_size)
            for position in (part.start, part.start + part.num_tokens)
        )
        for entry in range(max(1, first), last):
            partition.release_exact(table, entry)

    def _release_encoded_survivors(
        self, part: SequenceStep, request: Request, partition: Partition
    ) -> None:
        survivors, end = request.survivors, part.start + part.num_tokens
        if survivors is None or survivors.table.codec == EXACT or not survivors.ends_epoch(end):
            return
        for entry in survivors.filled_at(end):
            partition.release_exact(survivors.table, entry)

    def _release_unread(
        self, request: Request, table: BlockTable, partition: Partition
    ) -> list[Release]:
        assert request.sequence is not None, "the caller has looked"
        released: list[Release] = []
        for group, window in enumerate(self._windows):
            after = below = 0
            if window is not None:
                below = (request.num_planned - window + 1) // self._block_size
            elif request.survivors is not None:
                below = request.survivors.open_from(request.num_planned) // self._block_size
            elif table.recent_blocks is not None:
                # The first block holds the attention sinks.
                after = 1
                below = request.num_planned // self._block_size - table.recent_blocks + 1
            if below > max(after, table.released_below[group]):
                partition.release_below(table, group, below, after=after)
                released.append(Release(request.sequence, group, below, after))
        return released
