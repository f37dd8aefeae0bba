"""How many entries of a block table a sequence holds at one time."""

from collections.abc import Sequence


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
