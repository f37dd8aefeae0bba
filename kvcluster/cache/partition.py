"""One tenant's share of the block pools of a ring group, and the only way to a block.

Lives in the engine process. Every entry of a block table has a block in each KV group of its
rank, so entries are taken in all groups or in none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable, HeldBlock, TableEntry
from kvcluster.cache.encoded_pool import EncodedPool
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.types import EXACT, NO_BLOCK, PAGE_BLOCKS, BlockId, ModelSpec, Rank, TenantId


def _no_codec(codec: str) -> Sequence[int]:
    raise AssertionError(f"no pages were laid out for {codec}")


def _no_steps(codec: str) -> int | None:  # noqa: ARG001
    return None


@dataclass(frozen=True, slots=True)
class RankStatistics:
    """Blocks of one rank, over all KV groups."""

    num_blocks: int
    num_free: int


@dataclass(frozen=True, slots=True)
class PartitionStatistics:
    """A snapshot of one tenant's share."""

    tenant: TenantId
    num_used: int
    """Blocks that this tenant holds, over all ranks and groups, and what is counted beside them."""
    limit_blocks: int | None
    ranks: tuple[RankStatistics, ...]


class Partition:
    """What one tenant may take from the pools. `pools[rank][group]` may be shared by partitions.

    `limit_blocks` is the most blocks of any one KV group, over all ranks, that the tenant may
    hold; None: as many as the pools have. A page of encoded blocks counts as the exact blocks
    that it has room for, and belongs to this partition alone.
    """

    def __init__(
        self,
        pools: Sequence[Sequence[BlockPool]],
        *,
        tenant: TenantId,
        limit_blocks: int | None = None,
        encoded_per_page: Callable[[str], Sequence[int]] = _no_codec,
        exact_recent: int = 0,
        encoded_step: Callable[[str], int | None] = _no_steps,
    ) -> None:
        """`encoded_per_page`: how many blocks of a codec a page of each group holds.
        `exact_recent`: full blocks that a table with a codec keeps exact, beside its first one.
        `encoded_step`: how many of a codec are encoded at a time: see `ExactRegion`."""
        self.tenant = tenant
        self.limit_blocks = limit_blocks
        self._pools = tuple(tuple(groups) for groups in pools)
        self._used = [0] * self.num_groups
        self._beside = [0] * self.num_groups
        self._encoded_per_page = encoded_per_page
        self._exact_recent = exact_recent
        self._encoded_step = encoded_step
        self._encoded: dict[str, tuple[tuple[EncodedPool, ...], ...]] = {}

    @property
    def num_ranks(self) -> int:
        return len(self._pools)

    @property
    def num_groups(self) -> int:
        return len(self._pools[0])

    @property
    def num_used(self) -> int:
        return sum(self._used) + sum(self._beside)

    def can_append(self, table: BlockTable, rank: Rank) -> bool:
        """Whether `rank` could still take an entry of the table for this tenant."""
        for group in table.groups:
            pool, needed = self._pools[rank][group], 1
            is_encoded = table.codec_in(group) != EXACT
            if is_encoded and not self._encoded_pools(table.codec)[rank][group].has_partial:
                if not pool.num_free_pages:
                    return False
                needed += PAGE_BLOCKS
            if self._within_limit(group, pool.num_free) < needed:
                return False
        return True

    def free_blocks(self, rank: Rank) -> int:
        """Free blocks of the rank over all groups: the measure of how empty it is."""
        return sum(pool.num_free for pool in self._pools[rank])

    def append(self, table: BlockTable, rank: Rank) -> TableEntry | None:
        """Take a block in every group of the table from `rank` and add the entry to `table`.

        In a table with a codec all entries but the first get an encoded block beside the exact one.
        None, and nothing taken, when any group has none left or the limit is reached.
        """
        is_encoded = table.codec != EXACT and len(table) > 0
        taken = [HeldBlock(rank, NO_BLOCK, NO_BLOCK)] * self.num_groups
        for group in table.groups:
            encoded_id, encodes = NO_BLOCK, is_encoded and table.codec_in(group) != EXACT
            if encodes:
                encoded_id = self._take_encoded(table.codec, rank, group)
            block_id = self._take_exact(table, rank, group)
            taken[group] = HeldBlock(rank, block_id, encoded_id)
            if block_id == NO_BLOCK or (encodes and encoded_id == NO_BLOCK):
                for group_taken, held in enumerate(taken):
                    self._release(table.codec, group_taken, held)
                return None
        entry = TableEntry(
            rank,
            tuple(held.block_id for held in taken),
            tuple(held.encoded_id for held in taken) if is_encoded else (),
        )
        table.add(entry)
        return entry

    def release_below(self, table: BlockTable, group: int, below: int, *, after: int = 0) -> None:
        """Free one group's blocks of the entries from `after` to before `below`. The entries stay
        in the table."""
        for held in table.remove_below(group, below, after=after):
            self._release(table.codec, group, held)

    def release_exact(self, table: BlockTable, entry: int) -> None:
        """Free the exact blocks of an entry that is encoded now."""
        for group in table.groups:
            if table.codec_in(group) == EXACT:
                continue
            self._release(table.codec, group, table.remove_exact(group, entry))

    def count_beside(self, table: BlockTable, group: int, num_blocks: int) -> bool:
        """Count memory that the ranks keep for the sequence of `table` beside all pages, so many
        exact blocks' worth, in place of what was counted before. It takes no block of any pool,
        but of what the tenant may hold. False, and nothing changed: there is too little left."""
        more = num_blocks - table.num_beside[group]
        if more > 0 and more > self.free_per_group()[group]:
            return False
        table.num_beside[group] = num_blocks
        self._beside[group] += more
        return True

    def release_all(self, table: BlockTable) -> None:
        """Free every block of `table`, and what is counted beside it."""
        for group in range(self.num_groups):
            self._beside[group] -= table.num_beside[group]
            table.num_beside[group] = 0
            for held in table.remove_all(group):
                self._release(table.codec, group, held)

    def exact_region(self, codec: str) -> ExactRegion:
        """What a table with the codec keeps exact."""
        return ExactRegion(self._exact_recent, self._encoded_step(codec))

    def blocks_for(self, entries: Sequence[int], codec: str) -> tuple[int, ...]:
        """Exact blocks' worth of memory that so many entries (one number per group) take between
        steps, in whole pages where they are encoded."""
        # The first one stays exact, the latest ones, and the one that is being filled.
        num_exact = 2 + self.exact_region(codec).most_blocks
        return tuple(
            self.blocks_in(group, count, codec, num_exact=num_exact)
            for group, count in enumerate(entries)
        )

    def blocks_in(self, group: int, num_entries: int, codec: str, *, num_exact: int) -> int:
        """The same of one group, where so many entries have exact blocks, the first among them."""
        if codec == EXACT:
            return num_entries
        per_page = self._encoded_per_page(codec)[group]
        num_pages = -(-max(0, num_entries - 1) // per_page)
        return min(num_entries, num_exact) + PAGE_BLOCKS * num_pages

    def stored_share(self, codec: str) -> float:
        """What an encoded block takes of an exact one, on average over the groups."""
        if codec == EXACT:
            return 1.0
        shares = [PAGE_BLOCKS / per_page for per_page in self._encoded_per_page(codec)]
        return sum(shares) / len(shares)

    def has_room(self, blocks: Sequence[int]) -> bool:
        """Whether so many more blocks (one number per group) would fit now."""
        return all(
            num_blocks <= num_free
            for num_blocks, num_free in zip(blocks, self.free_per_group(), strict=True)
        )

    def held(self, table: BlockTable) -> tuple[float, ...]:
        """Exact blocks' worth of memory that the table holds, per group."""
        if table.codec == EXACT:
            return tuple(table.num_exact(group) for group in range(self.num_groups))
        return tuple(
            table.num_exact(group) + table.num_encoded(group) * PAGE_BLOCKS / per_page
            for group, per_page in enumerate(self._encoded_per_page(table.codec))
        )

    def free_per_group(self) -> tuple[int, ...]:
        """Blocks per group, over all ranks, that the tenant could take now."""
        return tuple(
            self._within_limit(group, sum(groups[group].num_free for groups in self._pools))
            for group in range(self.num_groups)
        )

    def capacity(self, codec: str = EXACT) -> tuple[int, ...]:
        """Most blocks per group that a sequence of the tenant could ever hold. With a codec, those
        of whole pages."""
        unit = 1 if codec == EXACT else PAGE_BLOCKS
        totals = (
            sum(groups[group].num_blocks // unit * unit for groups in self._pools)
            for group in range(self.num_groups)
        )
        if self.limit_blocks is None:
            return tuple(totals)
        return tuple(min(total, self.limit_blocks) for total in totals)

    def statistics(self) -> PartitionStatistics:
        return PartitionStatistics(
            tenant=self.tenant,
            num_used=self.num_used,
            limit_blocks=self.limit_blocks,
            ranks=tuple(
                RankStatistics(
                    num_blocks=sum(pool.num_blocks for pool in groups),
                    num_free=sum(pool.num_free for pool in groups),
                )
                for groups in self._pools
            ),
        )

    def _encoded_pools(self, codec: str) -> tuple[tuple[EncodedPool, ...], ...]:
        """By rank and group; made for the first table with the codec."""
        if codec not in self._encoded:
            sizes = self._encoded_per_page(codec)
            self._encoded[codec] = tuple(
                tuple(
                    EncodedPool(pool, per_page) for pool, per_page in zip(pools, sizes, strict=True)
                )
                for pools in self._pools
            )
        return self._encoded[codec]

    def _take_exact(self, table: BlockTable, rank: Rank, group: int) -> BlockId:
        pool = self._pools[rank][group]
        if self._within_limit(group, pool.num_free) < 1:
            return NO_BLOCK
        comes_and_goes = table.recent_blocks is not None or group == table.epoch_group
        if table.codec == EXACT and not comes_and_goes:
            block_id = pool.allocate(after=table.last_id(rank, group))
        else:
            block_id = pool.allocate_lowest()
        assert block_id is not None, "num_free counted a block that the pool has not"
        self._used[group] += 1
        return block_id

    def _take_encoded(self, codec: str, rank: Rank, group: int) -> BlockId:
        encoded = self._encoded_pools(codec)[rank][group]
        needs_page = not encoded.has_partial
        if (
            needs_page
            and self._within_limit(group, self._pools[rank][group].num_free) < PAGE_BLOCKS
        ):
            return NO_BLOCK
        block_id = encoded.allocate()
        if block_id is None:
            return NO_BLOCK
        self._used[group] += PAGE_BLOCKS * needs_page
        return block_id

    def _release(self, codec: str, group: int, held: HeldBlock) -> None:
        if held.block_id != NO_BLOCK:
            self._pools[held.rank][group].release(held.block_id)
            self._used[group] -= 1
        if held.encoded_id != NO_BLOCK:
            encoded = self._encoded_pools(codec)[held.rank][group]
            num_pages = encoded.num_pages
            encoded.release(held.encoded_id)
            self._used[group] -= PAGE_BLOCKS * (num_pages - encoded.num_pages)
            if not encoded.num_pages:
                self._forget_empty(codec)

    def _forget_empty(self, codec: str) -> None:
        """Requests choose a codec's parameters, so there is no end of codecs."""
        if not any(encoded.num_pages for rank in self._encoded[codec] for encoded in rank):
            del self._encoded[codec]

    def _within_limit(self, group: int, num_free: int) -> int:
        limit = self.limit_blocks
        if limit is None:
            limit = sum(groups[group].num_blocks for groups in self._pools)
        return min(num_free, max(0, limit - self._used[group] - self._beside[group]))


def entries_per_group(
    windows: Sequence[int | None],
    num_tokens: int,
    *,
    block_size: int,
    chunk_tokens: int,
    recent_blocks: int | None = None,
) -> tuple[int, ...]:
    """Most table entries per group that a sequence of `num_tokens` holds at one time, when it is
    computed in chunks of at most `chunk_tokens`. `recent_blocks`: see `BlockTable`.
    """
    entries = -(-num_tokens // block_size)
    # The first one, and a chunk that begins inside a block.
    unwindowed = (
        entries
        if recent_blocks is None
        else min(entries, recent_blocks + -(-chunk_tokens // block_size) + 2)
    )
    return tuple(
        unwindowed
        if window is None
        else min(entries, -(-(window + chunk_tokens) // block_size) + 1)
        for window in windows
    )


def block_bytes_per_group(spec: ModelSpec, block_size: int) -> tuple[int, ...]:
    """Bytes of one block of exact K and V, in all layers of each group together."""
    elements = [0] * len(spec.windows)
    for layer in (spec.layers[index] for index in spec.storing_layers):
        elements[spec.group_of(layer)] += layer.kv_elements_per_token
    return tuple(block_size * spec.bytes_per_element * count for count in elements)
