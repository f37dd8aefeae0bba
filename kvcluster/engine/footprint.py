"""How much memory a sequence takes under its policy."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.cache.partition import Partition
from kvcluster.cache.table_entries import entries_per_group
from kvcluster.engine.kept_beside import KeptBeside
from kvcluster.engine.survivor_table import group_by_score
from kvcluster.retention.base import Budgeted
from kvcluster.retention.offered import budgeted, recent_blocks
from kvcluster.types import ModelSpec, Policy


class Footprint(NamedTuple):
    """Most memory that a sequence holds at one time."""

    num_bytes: int
    """In pages, and beside them."""
    blocks: tuple[int, ...]
    """The same as exact blocks' worth, per KV group: what the partition counts."""


def footprint(
    policy: Policy,
    spec: ModelSpec,
    num_tokens: int,
    partition: Partition,
    *,
    block_size: int,
    chunk_tokens: int,
) -> Footprint:
    """Of a sequence of `num_tokens`, when it is computed in chunks of at most `chunk_tokens`."""
    in_pages = _blocks_in_pages(
        policy,
        spec.windows,
        num_tokens,
        partition,
        block_size=block_size,
        chunk_tokens=chunk_tokens,
    )
    block_bytes = block_bytes_per_group(spec, block_size)
    beside = KeptBeside(policy, spec, block_size)
    num_beside = beside.most_bytes(num_tokens)
    blocks = tuple(
        count + (blocks_beside(num_beside, size) if group == beside.group else 0)
        for group, (count, size) in enumerate(zip(in_pages, block_bytes, strict=True))
    )
    num_bytes = sum(count * size for count, size in zip(in_pages, block_bytes, strict=True))
    return Footprint(num_bytes + num_beside, blocks)


def blocks_beside(num_bytes: int, block_bytes: int) -> int:
    """The exact blocks that bytes beside the pages stand for."""
    return -(-num_bytes // block_bytes)


def _blocks_in_pages(
    policy: Policy,
    windows: Sequence[int | None],
    num_tokens: int,
    partition: Partition,
    *,
    block_size: int,
    chunk_tokens: int,
) -> tuple[int, ...]:
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


def held_bytes(
    tables: Iterable[BlockTable], partition: Partition, block_bytes: Sequence[int]
) -> int:
    """Bytes of pages that the tables hold. `block_bytes`: of an exact block of each KV group."""
    return round(
        sum(
            num_blocks * num_bytes
            for table in tables
            for num_blocks, num_bytes in zip(partition.held(table), block_bytes, strict=True)
        )
    )


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
