"""The blocks of one request after the other: what its next positions need, and from which ranks."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import le
from typing import Final

from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.cache.partition import Partition
from kvcluster.cache.partitions import CachePartitions
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.footprint import blocks_beside, footprint, held_bytes
from kvcluster.engine.kept_beside import KeptBeside
from kvcluster.engine.plan import NewBlock
from kvcluster.engine.request import Request
from kvcluster.engine.sharding import zigzag
from kvcluster.engine.survivor_table import survivor_table
from kvcluster.retention.offered import recent_blocks
from kvcluster.types import EXACT, ModelSpec, Policy, Rank, TenantId

_MAX_POLICIES: Final = 256
"""Whose counts are kept at hand."""


class SequenceBlocks:
    """Takes blocks for requests, through their tenants' partitions, and counts what they hold."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        cache: CacheConfig,
        engine: EngineConfig,
        partitions: CachePartitions,
    ) -> None:
        self._spec = spec
        self._windows = spec.windows
        self._block_size = cache.block_size
        self._chunk_tokens = max(engine.prefill_chunk_tokens, cache.block_size)
        self._config = engine
        self._partitions = partitions
        self._block_bytes = block_bytes_per_group(spec, cache.block_size)
        self._beside = lru_cache(_MAX_POLICIES)(self._kept_beside)

    def has_room(self, request: Request, num_running: int, saved: Sequence[int]) -> bool:
        """Whether a request could start beside so many that run. `saved`: blocks per KV group that
        it finds there."""
        # Each running request will soon want one more; without it the newcomer is preempted.
        blocks = [count + num_running for count in self._blocks_to_start(request, saved)]
        return self.partition(request).has_room(blocks)

    def is_below_limit(self, request: Request, saved: Sequence[int]) -> bool:
        """Whether its tenant's limit allows the request to start now."""
        return self.partition(request).is_below_limit(self._blocks_to_start(request, saved))

    def is_in_floor(self, request: Request, saved: Sequence[int]) -> bool:
        """Whether what the request needs to start is its tenant's whatever others do."""
        return self.partition(request).is_in_floor(self._blocks_to_start(request, saved))

    def could_fit(self, request: Request) -> bool:
        """Whether the request could start if its tenant held nothing else, and others no more than
        their floors."""
        capacity = self.partition(request).capacity(request.policy.storage)
        needed = self._footprint(request, self._known_tokens(request), self._block_size)
        return all(map(le, needed, capacity))

    def _blocks_to_start(self, request: Request, saved: Sequence[int]) -> tuple[int, ...]:
        needed = self._footprint(request, self._known_tokens(request) + 1, self._chunk_tokens)
        blocks = tuple(max(0, count - there) for count, there in zip(needed, saved, strict=True))
        if request.policy.storage == EXACT:
            return blocks
        # A chunk is exact until its step has run.
        in_chunk = -(-self._chunk_tokens // self._block_size)
        return tuple(count + in_chunk for count in blocks)

    def _footprint(self, request: Request, num_tokens: int, chunk_tokens: int) -> tuple[int, ...]:
        return footprint(
            request.policy,
            self._spec,
            num_tokens,
            self.partition(request),
            block_size=self._block_size,
            chunk_tokens=chunk_tokens,
        ).blocks

    def _known_tokens(self, request: Request) -> int:
        return max(request.known_length, len(request.tokens))

    def open(self, request: Request) -> None:
        """Give the request empty tables."""
        survivors = survivor_table(request.policy, self._windows, self._block_size)
        table = BlockTable(
            len(self._windows),
            request.policy.storage,
            recent_blocks=recent_blocks(request.policy.retention, self._block_size),
            epoch_group=None if survivors is None else survivors.group,
        )
        request.hold(table, survivors)

    def partition(self, request: Request) -> Partition:
        """That of the request's tenant."""
        return self._partitions.of(request.spec.tenant)

    def release(self, tenant: TenantId, tables: Iterable[BlockTable]) -> None:
        """Free all blocks of the tables of a tenant's request."""
        for table in tables:
            self._partitions.of(tenant).release_all(table)

    def cover(self, request: Request, end: int) -> tuple[int, list[NewBlock]]:
        """Take the blocks that positions below `end` need; returns how far there are enough, and
        the entries that were added for positions."""
        assert request.table is not None, "a request that is planned has a table"
        if not self._count_beside(request, request.table, end):
            return request.num_planned, []
        survivors = request.survivors
        if survivors is not None and survivors.ends_epoch(end):
            kept = survivors.num_survivors(end)
            survivors.note(self._append_blocks(request, survivors.table, kept))
            if len(survivors.table) * self._block_size < kept:
                # The epoch's last block waits until the survivors have a place.
                end = max(request.num_planned, end - self._block_size)
        appended = self._append_blocks(request, request.table, end)
        return min(end, len(request.table) * self._block_size), appended

    def _count_beside(self, request: Request, table: BlockTable, end: int) -> bool:
        """Whether what the ranks keep beside the blocks, up to `end`, is the tenant's to have."""
        beside = self._beside(request.policy)
        if beside.group is None:
            return True
        num_bytes = beside.most_bytes(end)
        num_blocks = blocks_beside(num_bytes, self._block_bytes[beside.group])
        return self.partition(request).count_beside(table, beside.group, num_blocks)

    def _kept_beside(self, policy: Policy) -> KeptBeside:
        return KeptBeside(policy, self._spec, self._block_size)

    def _append_blocks(self, request: Request, table: BlockTable, end: int) -> list[NewBlock]:
        """Add the entries that positions below `end` need, as far as there are blocks."""
        count = -(-end // self._block_size) - len(table)
        if count < 1:
            return []
        appended: list[NewBlock] = []
        partition = self.partition(request)
        for rank in self._owners(request, table, count):
            entry = partition.append(table, rank)
            if entry is None:
                entry = partition.append(table, self._emptiest_first(request, table)[0])
            while entry is None and partition.make_room(table):
                entry = partition.append(table, self._emptiest_first(request, table)[0])
            if entry is None:
                break
            appended.append(NewBlock(entry.rank, entry.block_ids, entry.encoded_ids))
        return appended

    def _owners(self, request: Request, table: BlockTable, count: int) -> Sequence[Rank]:
        if request.known_length >= self._config.shard_min_tokens:
            return zigzag(count, self._emptiest_first(request, table))
        owners = [held.owners[-1] for held in (table, *request.tables) if held.owners]
        return [owners[0] if owners else self._emptiest_first(request, table)[0]] * count

    def _emptiest_first(self, request: Request, table: BlockTable) -> list[Rank]:
        partition = self.partition(request)
        after_last = table.owners[-1] + 1 if table.owners else 0

        def emptiness(rank: Rank) -> tuple[bool, int, int]:
            # Equal ranks take turns, starting after the sequence's last one.
            turn = (rank - after_last) % partition.num_ranks
            return (not partition.can_append(table, rank), -partition.free_blocks(rank), turn)

        return sorted((Rank(rank) for rank in range(partition.num_ranks)), key=emptiness)

    def note_peak(self, request: Request) -> None:
        """Take note of what the request holds between steps."""
        held = held_bytes(request.tables, self.partition(request), self._block_bytes)
        held += self._beside(request.policy).num_bytes(request.num_planned)
        request.peak_kv_bytes = max(request.peak_kv_bytes, held)
        request.peak_tokens = max(request.peak_tokens, request.num_planned)
