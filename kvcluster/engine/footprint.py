"""How many blocks a sequence takes under its policy."""

from collections.abc import Sequence

from kvcluster.cache.partition import entries_per_group
from kvcluster.retention.offered import recent_blocks
from kvcluster.types import Policy


def entries_under(
    policy: Policy,
    windows: Sequence[int | None],
    num_tokens: int,
    *,
    block_size: int,
    chunk_tokens: int,
) -> tuple[int, ...]:
    """Most table entries per KV group that a sequence of `num_tokens` holds at one time, when it
    is computed in chunks of at most `chunk_tokens`."""
    return entries_per_group(
        windows,
        num_tokens,
        block_size=block_size,
        chunk_tokens=chunk_tokens,
        recent_blocks=recent_blocks(policy.retention, block_size),
    )
