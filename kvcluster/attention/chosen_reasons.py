"""Why no kernel serves rows that choose their blocks, in words."""

from typing import Final

from kvcluster_kernels.chosen_blocks import MAX_BLOCKS
from kvcluster_kernels.prefill_arguments import MAX_HEAD_DIM

from kvcluster.attention.kernel_rows import widest_head
from kvcluster.types import LayerGeometry

SURVIVORS: Final = "their lists end in the middle of a block"
"""Against rows that choose among tokens kept by score."""
_LEAST_TOKENS: Final = 16
"""Of a block: a matrix product is of as many numbers at least."""


def reason_against(
    layer: LayerGeometry,
    *,
    block_size: int,
    num_blocks: int = 0,
    has_tiles: bool = False,
    has_rows: bool = False,
    unread_codec: str | None = None,
) -> str | None:
    """None: kernels serve such a part. `has_tiles`: rows of the prompt choose, a block together;
    `has_rows`: rows of the output, each alone. `unread_codec`: what blocks are written by, where no
    kernel of decode reads it."""
    if block_size < _LEAST_TOKENS or block_size & (block_size - 1):
        return f"blocks of {block_size} tokens: want a power of two, {_LEAST_TOKENS} or more"
    if num_blocks > MAX_BLOCKS:
        return f"{num_blocks} blocks are more than a program looks at"
    widest = max(layer.key_dim, layer.value_dim)
    if has_tiles and widest > MAX_HEAD_DIM:
        return f"heads of {widest} are wider than tiles of queries hold"
    if has_rows and widest > widest_head(layer):
        return f"heads of {widest} are wider than kernels of decode hold"
    if has_rows and unread_codec is not None:
        return f"no kernel of decode reads {unread_codec}"
    return None
