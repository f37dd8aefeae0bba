"""Which rank gets which new block of a chunk. Ownership is written to the block table, so these
rules may change from one chunk to the next.
"""

from collections.abc import Sequence

from kvcluster.types import Rank


def zigzag(num_blocks: int, ranks: Sequence[Rank]) -> list[Rank]:
    """Owners of a chunk's new blocks: 2R pieces of near-equal size, pieces i and 2R-1-i to one
    rank, which balances causal work.

    The first of `ranks` get the blocks that do not divide evenly, so a chunk of few blocks goes
    to the first ranks only.
    """
    num_ranks = len(ranks)
    num_pieces = 2 * num_ranks
    smallest, num_left_over = divmod(num_blocks, num_pieces)
    sizes = [smallest] * num_pieces
    # One block more for the outer piece of each rank, then for the inner one, first rank first.
    outer_then_inner = [*range(num_ranks), *range(num_pieces - 1, num_ranks - 1, -1)]
    for piece in outer_then_inner[:num_left_over]:
        sizes[piece] += 1
    owners: list[Rank] = []
    for piece, size in enumerate(sizes):
        owners += [ranks[min(piece, num_pieces - 1 - piece)]] * size
    return owners
