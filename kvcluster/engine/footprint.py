"""How many blocks a sequence takes under its policy."""

from collections.abc import Sequence

from kvcluster.cache.partition import Partition, entries_per_group
from kvcluster.engine.survivor_table import group_by_score
from kvcluster.retention.base import Budgeted
from kvcluster.retention.offered import budgeted, recent_blocks
from kvcluster.types import Policy


def blocks_under(
    policy: Policy,
    windows: Sequence[int | None],
    num_tokens: int,
    partition: Partition,
    *,
    block_size: int,
    chunk_tokens: int,
) -> tuple[int, ...]:
    """Most exact blocks' worth of memory per KV group that a sequence of `num_tokens` holds at one
    time, when it is computed in chunks of at most `chunk_tokens`."""
    entries = entries_per_group(
        windows,
        num_tokens,
        block_size=block_size,
        chunk_tokens=chunk_tokens,
        recent_blocks=recent_blocks(policy.retention, block_size),
    )
    blocks = list(partition.blocks_for(entries, policy.storage))
    retention, group = budgeted(policy.retention, block_size), group_by_score(windows)
    if retention is not None and group is not None:
        blocks[group] = _blocks_by_score(retention, num_tokens, policy.storage, group, partition)
    return tuple(blocks)


def _blocks_by_score(
    retention: Budgeted, num_tokens: int, codec: str, group: int, partition: Partition
) -> int:
    """Most is held when the last whole epoch ends: it, and the survivors chosen from it. Survivors
    that fill their blocks then are exact until the step has run."""
    size, epoch = retention.block_size, retention.epoch_tokens
    last_end = retention.epoch_start(num_tokens)
    if not last_end:
        return -(-num_tokens // size)
    before, after = (-(-retention.counts(end).kept // size) for end in (last_end - epoch, last_end))
    num_exact = 2 + after - before
    survivors = partition.blocks_in(group, after, codec, num_exact=num_exact)
    return epoch // size + survivors
