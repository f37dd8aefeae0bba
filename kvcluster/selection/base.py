"""Which blocks of the cache a query reads. Nothing is forgotten: another query may read others.

The tokens that a query may read lie in blocks: those that retention left, in order of position,
then the blocks up to the query's own. A method picks some of them. The query's own block is always
read, up to the query.

Rows of the prompt that lie in one block choose together; rows of the output choose alone. So what
is read is a matter of positions and of where the prompt ends, never of how rows were computed:
chunks that begin with blocks, and a generation that is computed again, change nothing.

A block is known by its keys as they were written, before any codec: a row that reads some blocks
exact and the others restored compares them all alike, and what is known never changes.

Shape letters: T query tokens, J query blocks, B blocks, O tokens of a block, S keys, H query heads,
K KV heads, G heads that choose for themselves (1: all choose alike; K or H), D head dimension.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcluster.selection.need import Need
from kvcluster.types import LayerGeometry


class Rows(NamedTuple):
    """Query tokens of one layer, and the blocks that they may read."""

    q_THD: Tensor
    own_T: Tensor
    """int64: index of the block that the row is in. Never decreases."""
    readable_TB: Tensor
    """Blocks that hold tokens which the row may read, its own among them; none after it. The same
    for all rows of a block."""
    is_prompt_T: Tensor
    """False: the row is output, which begins after all of the prompt."""


class KeySummaries(NamedTuple):
    """What is known of the keys of each block, rotary position included. A plane that the method
    does not need has no dimensions (D = 0)."""

    low_KBD: Tensor
    high_KBD: Tensor
    """Both in the dtype of the keys, of which they are numbers."""
    mean_KBD: Tensor
    """float32."""

    @property
    def num_bytes(self) -> int:
        return sum(plane.nbytes for plane in self)

    def followed_by(self, other: "KeySummaries") -> "KeySummaries":
        return KeySummaries(*(torch.cat(planes, dim=1) for planes in zip(self, other, strict=True)))

    def at(self, places_B: Tensor) -> "KeySummaries":
        """Those of some blocks."""
        return KeySummaries(*(plane[:, places_B] for plane in self))


class QueryBlocks(NamedTuple):
    """Consecutive rows that choose together."""

    own_J: Tensor
    is_prompt_J: Tensor
    num_rows_J: Tensor

    @property
    def places(self) -> Tensor:
        """place_T: index of each row's query block."""
        places_J = torch.arange(len(self.own_J), device=self.own_J.device)
        return places_J.repeat_interleave(self.num_rows_J)


class Ranking(NamedTuple):
    """What a method that compares blocks reads, but for their scores."""

    always_JB: Tensor
    """Blocks that are read whatever they are worth, of those that may be read."""
    num_J: Tensor
    """How many of the others are read, the best ones; all where there are fewer."""

    def picked(self, score_GJB: Tensor, readable_JB: Tensor) -> Tensor:
        """reads_GJB."""
        free_JB = readable_JB & ~self.always_JB
        return pick_best(score_GJB, free_JB, self.num_J) | self.always_JB


class BlockSelection(Protocol):
    """Picks blocks for rows of queries."""

    @property
    def name(self) -> str: ...

    @property
    def block_size(self) -> int: ...

    @property
    def needs(self) -> Need: ...

    @property
    def chooses_in_prompt(self) -> bool:
        """Whether rows of the prompt choose too; otherwise they read all that they may."""
        ...

    def covers(self, num_blocks: int) -> bool:
        """Whether rows that may read at most so many blocks read all of them, whatever the scores.
        False may be wrong: it costs the comparison."""
        ...

    def num_choosing(self, geometry: LayerGeometry) -> int:
        """G of the layer, where the method compares blocks."""
        ...

    def scores(self, geometry: LayerGeometry, q_JHD: Tensor, keys: KeySummaries) -> Tensor:
        """score_GJB, float32: the worth of each block by itself, whichever others are given.

        `q_JHD` are the means of the query blocks' rows, float64. Never called for `Need.NOTHING`.
        """
        ...

    def ranking(self, blocks: QueryBlocks, readable_JB: Tensor) -> Ranking | None:
        """What `choose` adds to scores; None where it looks at none."""
        ...

    def choose(
        self, layer: int, blocks: QueryBlocks, readable_JB: Tensor, score_GJB: Tensor
    ) -> Tensor:
        """reads_GJB: the blocks that each query block reads, out of those that it may.

        Scores of its own block and of later ones are not looked at. For `Need.NOTHING` there are
        none: B is 0.
        """
        ...


def reads(
    selection: BlockSelection, layer: int, geometry: LayerGeometry, rows: Rows, keys: KeySummaries
) -> Tensor:
    """reads_GTB: the blocks that each row reads, out of those that it may.

    All rows of the prompt that lie in one block come together. What `keys` say of a row's own block
    and of later ones is not looked at.
    """
    blocks = query_blocks(rows.own_T, rows.is_prompt_T)
    readable_JB = rows.readable_TB[blocks.num_rows_J.cumsum(0) - 1]
    score_GJB = rows.q_THD.new_empty((1, len(blocks.own_J), 0))
    if selection.needs is not Need.NOTHING:
        score_GJB = selection.scores(geometry, pooled(rows.q_THD, blocks), keys)
    return selection.choose(layer, blocks, readable_JB, score_GJB)[:, blocks.places]


def query_blocks(own_T: Tensor, is_prompt_T: Tensor) -> QueryBlocks:
    """Group rows, of which there is at least one: prompt by block, output one by one."""
    is_first_T = ~is_prompt_T
    is_first_T[0] = True
    is_first_T[1:] |= own_T[1:] != own_T[:-1]
    num_rows_J = torch.bincount(is_first_T.cumsum(0) - 1)
    return QueryBlocks(own_T[is_first_T], is_prompt_T[is_first_T], num_rows_J)


def pooled(q_THD: Tensor, blocks: QueryBlocks) -> Tensor:
    """q_JHD, float64: the mean of each query block's rows."""
    q_THD = q_THD.double().contiguous()
    return torch.segment_reduce(q_THD, "mean", lengths=blocks.num_rows_J, axis=0)


def readable(own_J: Tensor, num_blocks: int, recent_blocks: int | None) -> Tensor:
    """readable_JB among the first `num_blocks`: a block's rows may read the blocks up to their own
    or, of those, the first one and the `recent_blocks` latest ones."""
    blocks_B = torch.arange(num_blocks, device=own_J.device)
    readable_JB = blocks_B <= own_J[:, None]
    if recent_blocks is not None:
        readable_JB &= (blocks_B == 0) | (blocks_B > own_J[:, None] - recent_blocks)
    return readable_JB


def summaries(k_KSD: Tensor, block_size: int, needs: Need) -> KeySummaries:
    """Of tokens in line, a block after the other; the last one may be short."""
    num_heads, num_keys, dim = k_KSD.shape
    short = -num_keys % block_size
    # Repeating the last key changes neither the least nor the largest number.
    filled_KSD = pad(k_KSD, (0, 0, 0, short), mode="replicate") if short else k_KSD
    k_KBOD = filled_KSD.reshape(num_heads, -1, block_size, dim)
    none_KB0 = k_KSD.new_empty((num_heads, k_KBOD.shape[1], 0))
    if needs is Need.BOUNDS:
        return KeySummaries(k_KBOD.amin(dim=2), k_KBOD.amax(dim=2), none_KB0)
    if needs is Need.NOTHING:
        return KeySummaries(none_KB0, none_KB0, none_KB0)
    # In float64 the order of the sum, which differs by shape, does not show in the rounded mean.
    sum_KBD = k_KBOD.double().sum(dim=2)
    num_tokens_B = torch.full((sum_KBD.shape[1],), block_size, device=k_KSD.device)
    if short:
        sum_KBD[:, -1] -= short * k_KSD[:, -1].double()
        num_tokens_B[-1] -= short
    return KeySummaries(none_KB0, none_KB0, (sum_KBD / num_tokens_B[:, None]).float())


def upper_bounds(q_THD: Tensor, keys: KeySummaries) -> Tensor:
    """bound_HTB, float64: no q·k of a key in the block is larger, but for rounding (Quest, eq. 1).

    float64, so that the order of sums, which differs by shape, decides between no two blocks.
    """
    num_sharing = q_THD.shape[1] // len(keys.low_KBD)
    q_HTD = q_THD.double().transpose(0, 1)
    low_HDB = keys.low_KBD.double().transpose(1, 2).repeat_interleave(num_sharing, dim=0)
    high_HDB = keys.high_KBD.double().transpose(1, 2).repeat_interleave(num_sharing, dim=0)
    return q_HTD.clamp(min=0) @ high_HDB + q_HTD.clamp(max=0) @ low_HDB


def pick_best(score_GJB: Tensor, free_JB: Tensor, num_J: Tensor) -> Tensor:
    """picked_GJB: of the blocks in `free_JB` the best `num_J`, or all where there are fewer.

    Ties go to the lower block.
    """
    score_GJB = score_GJB.masked_fill(~free_JB, -torch.inf)
    order_GJB = score_GJB.argsort(dim=-1, descending=True, stable=True)
    places_B = torch.arange(score_GJB.shape[-1], device=score_GJB.device)
    is_best_GJB = (places_B < num_J[:, None]).expand_as(order_GJB)
    return torch.zeros_like(is_best_GJB).scatter(-1, order_GJB, is_best_GJB) & free_JB


def share_of_work(reads_GTB: Tensor, rows: Rows) -> float:
    """Blocks that are read, of those that full attention over the same tokens reads."""
    return float(reads_GTB.double().mean(dim=0).sum() / rows.readable_TB.sum())
