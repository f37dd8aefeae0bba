"""One tenant's share of the block pools of a ring group, and the only way to a block.

Lives in the engine process. What a tenant may take, `tier.TierLedger` says; `partitions` makes one
partition for each tenant. Every entry of a block table has a block in each KV group of its
rank, so entries are taken in all groups or in none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import le

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable, FreedBlock, HeldBlock, TableEntry
from kvcluster.cache.encoded_pool import EncodedPool
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.pool_tier import RankStatistics, pool_ledger, rank_statistics
from kvcluster.cache.tier import Reclaimable, TierLedger, TierUse
from kvcluster.types import EXACT, NO_BLOCK, PAGE_BLOCKS, BlockId, Rank, TenantId


def _no_codec(codec: str) -> Sequence[int]:
    raise AssertionError(f"no pages were laid out for {codec}")


def _no_steps(codec: str) -> int | None:  # noqa: ARG001
    return None


@dataclass(frozen=True, slots=True)
class PartitionStatistics:
    """A snapshot of one tenant's share."""

    tenant: TenantId
    num_used: int
    """Blocks that this tenant holds, over all ranks and groups, and what is counted beside them."""
    ranks: tuple[RankStatistics, ...]


class Partition:
    """What one tenant may take from the pools. `pools[rank][group]` may be shared by partitions
    with the same ledger.

    A page of encoded blocks counts as the exact blocks that it has room for, and belongs to this
    partition alone.
    """

    def __init__(
        self,
        pools: Sequence[Sequence[BlockPool]],
        *,
        tenant: TenantId,
        ledger: TierLedger | None = None,
        encoded_per_page: Callable[[str], Sequence[int]] = _no_codec,
        exact_recent: int = 0,
        encoded_step: Callable[[str], int | None] = _no_steps,
    ) -> None:
        """`ledger`: counts the pools' blocks (`pool_ledger`); None: one of its own.
        `encoded_per_page`: how many blocks of a codec a page of each group holds.
        `exact_recent`: full blocks that a table with a codec keeps exact, beside its first one.
        `encoded_step`: how many of a codec are encoded at a time: see `ExactRegion`."""
        self.tenant = tenant
        self._pools = tuple(tuple(groups) for groups in pools)
        self._ledger = ledger or pool_ledger(self._pools)
        self._encoded_per_page = encoded_per_page
        self._exact_recent = exact_recent
        self._encoded_step = encoded_step
        self._encoded: dict[str, tuple[tuple[EncodedPool, ...], ...]] = {}
        self.freed: list[FreedBlock] = []
        """To be zeroed by the next step, before anything is written."""
        self.lender: Partition | None = None
        """That of the published prefixes, whose encoded blocks tables of this one may hold."""
        self.on_users_changed: Callable[[str, int, HeldBlock], None] = lambda *_: None

    @property
    def num_ranks(self) -> int:
        return len(self._pools)

    @property
    def num_groups(self) -> int:
        return len(self._pools[0])

    @property
    def num_used(self) -> int:
        return sum(self._ledger.used(self.tenant)) + sum(self._ledger.beside(self.tenant))

    def use(self) -> TierUse:
        """What the tenant has of the tier, and may have."""
        return self._ledger.use(self.tenant)

    def borrowed(self) -> tuple[int, ...]:
        """Blocks per group that the tenant holds above its floor."""
        return self._ledger.borrowed(self.tenant)

    def is_below_floor(self, group: int) -> bool:
        """Whether the next block of the group is the tenant's own."""
        return self._ledger.floor_left(self.tenant)[group] > 0

    def is_in_floor(self, blocks: Sequence[int]) -> bool:
        """Whether so many more blocks (one number per group) are covered by the floor."""
        return all(map(le, blocks, self._ledger.floor_left(self.tenant)))

    def is_owed(self) -> bool:
        """Whether the floor promises blocks of some group that cannot be had now."""
        available = self._ledger.available(self.tenant)
        left = self._ledger.floor_left(self.tenant)
        return any(
            have < min(promised, 1 + PAGE_BLOCKS)
            for have, promised in zip(available, left, strict=True)
        )

    def is_at_limit(self) -> bool:
        """Whether the tenant may hold no more of some group, whatever others do."""
        return self._ledger.is_at_limit(self.tenant)

    def level(self) -> float:
        """What the tenant borrows for its weight, in blocks of the group where that is most."""
        return max(self._ledger.level(self.tenant, group) for group in range(self.num_groups))

    def plug(self, cache: Reclaimable) -> None:
        """`cache` holds blocks of this partition for later use, and gives them up when asked."""
        self._ledger.plug(self.tenant, cache)

    def can_append(self, table: BlockTable, rank: Rank) -> bool:
        """Whether `rank` could still take an entry of the table for this tenant."""
        for group in table.groups:
            pool = self._pools[rank][group]
            needed, pages = 1, self._pages_needed(table, rank, group)
            if pages > pool.num_free_pages:
                return False
            needed += PAGE_BLOCKS * pages
            if min(pool.num_free, self._ledger.available_in(self.tenant, group)) < needed:
                return False
            if not self._may_break_pages(group, pages):
                return False
            in_broken = pool.num_free - PAGE_BLOCKS * pool.num_free_pages
            if in_broken < 1 and not self._may_break_pages(group, pages + 1):
                return False
        return True

    def make_room(self, table: BlockTable) -> bool:
        """Evict what is idle for one more entry of the table; False: there is nothing to evict, or
        it is not the tenant's to have."""
        needs = {
            group: 1 + PAGE_BLOCKS * (table.codec_in(group) != EXACT) for group in table.groups
        }
        available = self._ledger.available(self.tenant)
        short = [group for group, needed in needs.items() if available[group] < needed]
        # Where counts suffice, the free blocks lie on the wrong rank or in broken pages.
        freed = [self._ledger.reclaim(self.tenant, group, needs[group]) for group in short or needs]
        return any(freed)

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
                encoded_id = self.take_encoded(table.codec, rank, group)
            block_id = self._take_exact(table, rank, group)
            taken[group] = HeldBlock(rank, block_id, encoded_id)
            if block_id == NO_BLOCK or (encodes and encoded_id == NO_BLOCK):
                for group_taken, held in enumerate(taken):
                    self.release(table.codec, group_taken, held)
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
            self.release(table.codec, group, held)

    def release_exact(self, table: BlockTable, entry: int) -> None:
        """Free the exact blocks of an entry that is encoded now."""
        for group in table.groups:
            if table.codec_in(group) == EXACT:
                continue
            self.release(table.codec, group, table.remove_exact(group, entry))

    def count_beside(self, table: BlockTable, group: int, num_blocks: int) -> bool:
        """Count memory that the ranks keep for the sequence of `table` beside all pages, so many
        exact blocks' worth, in place of what was counted before. It takes no block of any pool,
        but of what the tenant may hold. False, and nothing changed: there is too little left."""
        more = num_blocks - table.num_beside[group]
        if not self._ledger.take_beside(self.tenant, group, more):
            return False
        table.num_beside[group] = num_blocks
        return True

    def release_all(self, table: BlockTable) -> None:
        """Free every block of `table`, and what is counted beside it."""
        for group in range(self.num_groups):
            self._ledger.take_beside(self.tenant, group, -table.num_beside[group])
            table.num_beside[group] = 0
            for held in table.remove_all(group):
                self.release(table.codec, group, held)

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

    def encoded_worth(self, codec: str, group: int) -> float:
        """Exact blocks' worth of memory that one encoded block of the group takes."""
        return PAGE_BLOCKS / self._encoded_per_page(codec)[group]

    def has_room(self, blocks: Sequence[int]) -> bool:
        """Whether so many more blocks (one number per group) would fit, once idle ones are evicted
        for them."""
        return self._ledger.has_room(self.tenant, blocks)

    def is_below_limit(self, blocks: Sequence[int]) -> bool:
        """Whether the limit allows so many more blocks (one number per group)."""
        return self._ledger.is_below_limit(self.tenant, blocks)

    def held(self, table: BlockTable) -> tuple[float, ...]:
        """Exact blocks' worth of memory that the table holds, per group."""
        if table.codec == EXACT:
            return tuple(table.num_exact(group) for group in range(self.num_groups))
        return tuple(
            table.num_exact(group) + table.num_encoded(group) * PAGE_BLOCKS / per_page
            for group, per_page in enumerate(self._encoded_per_page(table.codec))
        )

    def free_per_group(self) -> tuple[int, ...]:
        """Blocks per group, over all ranks, that the tenant could take, idle ones evicted."""
        return self._ledger.obtainable(self.tenant)

    def capacity(self, codec: str = EXACT) -> tuple[int, ...]:
        """Most blocks per group that a sequence of the tenant could ever hold, beside the floors of
        others. With a codec, those of whole pages."""
        unit = 1 if codec == EXACT else PAGE_BLOCKS
        totals = (
            sum(groups[group].num_blocks // unit * unit for groups in self._pools)
            for group in range(self.num_groups)
        )
        return tuple(map(min, totals, self._ledger.capacity(self.tenant)))

    def statistics(self) -> PartitionStatistics:
        return PartitionStatistics(
            tenant=self.tenant, num_used=self.num_used, ranks=rank_statistics(self._pools)
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

    def _pages_needed(self, table: BlockTable, rank: Rank, group: int) -> int:
        """Pages that the table's next encoded block on the rank begins."""
        if table.codec_in(group) == EXACT:
            return 0
        return int(not self._encoded_pools(table.codec)[rank][group].has_partial)

    def _take_exact(self, table: BlockTable, rank: Rank, group: int) -> BlockId:
        if self._ledger.available_in(self.tenant, group) < 1:
            return NO_BLOCK
        block_id = self._exact_block(table, rank, group)
        if block_id is None:
            return NO_BLOCK
        self._ledger.take(self.tenant, group, 1)
        return block_id

    def _exact_block(self, table: BlockTable, rank: Rank, group: int) -> BlockId | None:
        pool, last = self._pools[rank][group], table.last_id(rank, group)
        spare = self._ledger.spare_chunks(self.tenant, group)
        if spare is not None and spare < 1:
            block_id = pool.allocate_in_broken_page(last)
            if block_id is not None or not self._may_break_pages(group, 1):
                return block_id
        comes_and_goes = table.recent_blocks is not None or group == table.epoch_group
        if table.codec == EXACT and not comes_and_goes:
            return pool.allocate(after=last)
        return pool.allocate_lowest()

    def take_encoded(self, codec: str, rank: Rank, group: int) -> BlockId:
        """Take an encoded block; NO_BLOCK where there is none."""
        encoded = self._encoded_pools(codec)[rank][group]
        needs_page = not encoded.has_partial
        if needs_page and not self._may_take_page(group):
            return NO_BLOCK
        block_id = encoded.allocate()
        if block_id is None:
            return NO_BLOCK
        if needs_page:
            self._ledger.take(self.tenant, group, PAGE_BLOCKS)
        return block_id

    def _may_take_page(self, group: int) -> bool:
        is_counted = self._ledger.available_in(self.tenant, group) >= PAGE_BLOCKS
        return is_counted and self._may_break_pages(group, 1)

    def _may_break_pages(self, group: int, count: int) -> bool:
        """Whether so many free pages need not stay whole for the floors of others. Floors are kept
        in blocks first: within its own, a tenant may break what it needs."""
        spare = self._ledger.spare_chunks(self.tenant, group)
        return spare is None or spare >= count or self.is_below_floor(group)

    def pool(self, rank: Rank, group: int) -> BlockPool:
        return self._pools[rank][group]

    def encoded_pool(self, codec: str, rank: Rank, group: int) -> EncodedPool:
        return self._encoded_pools(codec)[rank][group]

    def used(self, group: int) -> int:
        return self._ledger.used(self.tenant)[group]

    def release(self, codec: str, group: int, held: HeldBlock) -> None:
        """Take one user of what an entry holds in a group away."""
        if held.is_lent:
            assert self.lender is not None, "only published prefixes are lent"
            self.lender.release(codec, group, HeldBlock(held.rank, NO_BLOCK, held.encoded_id))
            held = HeldBlock(held.rank, held.block_id, NO_BLOCK)
        if held.block_id != NO_BLOCK:
            pool = self._pools[held.rank][group]
            pool.release(held.block_id)
            # A block counts once, however many use it.
            if not pool.ref_count(held.block_id):
                self._ledger.give_back(self.tenant, group, 1)
                self.freed.append(FreedBlock(held.rank, group, EXACT, held.block_id))
        if held.encoded_id != NO_BLOCK:
            encoded = self._encoded_pools(codec)[held.rank][group]
            num_pages = encoded.num_pages
            encoded.release(held.encoded_id)
            if not encoded.num_users(held.encoded_id):
                self.freed.append(FreedBlock(held.rank, group, codec, held.encoded_id))
            num_freed = num_pages - encoded.num_pages
            self._ledger.give_back(self.tenant, group, PAGE_BLOCKS * num_freed)
            if not encoded.num_pages:
                self._forget_empty(codec)
        self.on_users_changed(codec, group, held)

    def _forget_empty(self, codec: str) -> None:
        """Requests choose a codec's parameters, so there is no end of codecs."""
        if not any(encoded.num_pages for rank in self._encoded[codec] for encoded in rank):
            del self._encoded[codec]
