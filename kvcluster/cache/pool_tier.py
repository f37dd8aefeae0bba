"""The GPU tier: the block pools of a ring group as a ledger counts them. Engine process."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.tier import TierLedger
from kvcluster.types import PAGE_BLOCKS


@dataclass(frozen=True, slots=True)
class RankStatistics:
    """Blocks of one rank, over all KV groups."""

    num_blocks: int
    num_free: int


def pool_ledger(
    pools: Sequence[Sequence[BlockPool]], block_bytes: Sequence[int] | None = None
) -> TierLedger:
    """Counts the blocks of `pools[rank][group]`, of `block_bytes` each per group (None: 1)."""
    groups = range(len(pools[0]))
    return TierLedger(
        [sum(rank[group].num_blocks for rank in pools) for group in groups],
        unit_bytes=block_bytes or [1] * len(groups),
        chunk=PAGE_BLOCKS,
        whole_free=lambda group: PAGE_BLOCKS * sum(rank[group].num_free_pages for rank in pools),
    )


def rank_statistics(pools: Sequence[Sequence[BlockPool]]) -> tuple[RankStatistics, ...]:
    """One for each rank."""
    return tuple(
        RankStatistics(
            num_blocks=sum(pool.num_blocks for pool in groups),
            num_free=sum(pool.num_free for pool in groups),
        )
        for groups in pools
    )
