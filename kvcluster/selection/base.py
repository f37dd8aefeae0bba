"""Which blocks of the cache a query reads. Nothing is forgotten: another query may read others.

The tokens that a query may read lie in blocks: those that retention left, in order of position,
then the blocks up to the query's own. A method picks some of them. The query's own block is always
read, up to the query.

Shape letters: T query tokens, J query blocks, B blocks, O tokens of a block, S keys, H query heads,
K KV heads, G heads that choose for themselves (1: all choose alike; K or H), D head dimension.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcluster.types import LayerGeometry


class Rows(NamedTuple):
    """Query tokens of one layer, and the blocks that they may read."""

    q_THD: Tensor
    own_T: Tensor
    """int64: index of the block that the row is in. Never decreases."""
    readable_TB: Tensor
    """Blocks that hold tokens which the row may read, its own among them; none after it."""


class KeySummaries(NamedTuple):
    """What is known of the keys of each block: float32, rotary position included."""

    low_KBD: Tensor
    high_KBD: Tensor
    mean_KBD: Tensor

    def followed_by(self, other: "KeySummaries") -> "KeySummaries":
        return KeySummaries(*(torch.cat(planes, dim=1) for planes in zip(self, other, strict=True)))


class QueryBlocks(NamedTuple):
    """Rows in runs of one block each."""

    own_J: Tensor
    place_T: Tensor
    """Index in `own_J` of each row."""
    num_rows_J: Tensor


class BlockSelection(Protocol):
    """Picks blocks for rows of queries."""

    @property
    def name(self) -> str: ...

    @property
    def block_size(self) -> int: ...

    def reads(self, layer: int, geometry: LayerGeometry, rows: Rows, keys: KeySummaries) -> Tensor:
        """reads_GTB: the blocks that each row reads, which it may.

        All rows of a block that are in one prefill come together. What `keys` say of a row's own
        block and of later ones is not looked at.
        """
        ...


def query_blocks(own_T: Tensor) -> QueryBlocks:
    """Group rows, of which there is at least one, by their block."""
    is_first_T = torch.ones_like(own_T, dtype=torch.bool)
    is_first_T[1:] = own_T[1:] != own_T[:-1]
    place_T = is_first_T.cumsum(0) - 1
    return QueryBlocks(own_T[is_first_T], place_T, torch.bincount(place_T))


def summaries(k_KSD: Tensor, block_size: int) -> KeySummaries:
    """Of tokens in line, a block after the other; the last one may be short."""
    num_heads, num_keys, dim = k_KSD.shape
    short = -num_keys % block_size
    k_KSD = k_KSD.float()
    # Repeating the last key changes neither the least nor the largest number.
    filled_KSD = pad(k_KSD, (0, 0, 0, short), mode="replicate") if short else k_KSD
    k_KBOD = filled_KSD.reshape(num_heads, -1, block_size, dim)
    sum_KBD = k_KBOD.sum(dim=2)
    num_tokens_B = torch.full((sum_KBD.shape[1],), block_size, device=k_KSD.device)
    if short:
        sum_KBD[:, -1] -= short * k_KSD[:, -1]
        num_tokens_B[-1] -= short
    return KeySummaries(k_KBOD.amin(dim=2), k_KBOD.amax(dim=2), sum_KBD / num_tokens_B[:, None])


def upper_bounds(q_THD: Tensor, keys: KeySummaries) -> Tensor:
    """bound_HTB: no q·k of a key in the block is larger, but for rounding (Quest, eq. 1)."""
    num_sharing = q_THD.shape[1] // len(keys.low_KBD)
    q_HTD = q_THD.float().transpose(0, 1)
    low_HDB = keys.low_KBD.transpose(1, 2).repeat_interleave(num_sharing, dim=0)
    high_HDB = keys.high_KBD.transpose(1, 2).repeat_interleave(num_sharing, dim=0)
    return q_HTD.clamp(min=0) @ high_HDB + q_HTD.clamp(max=0) @ low_HDB


def pick_best(score_GTB: Tensor, free_TB: Tensor, num_T: Tensor) -> Tensor:
    """picked_GTB: of the blocks in `free_TB` the best `num_T`, or all where there are fewer.

    Ties go to the lower block.
    """
    score_GTB = score_GTB.masked_fill(~free_TB, -torch.inf)
    order_GTB = score_GTB.argsort(dim=-1, descending=True, stable=True)
    places_B = torch.arange(score_GTB.shape[-1], device=score_GTB.device)
    is_best_GTB = (places_B < num_T[:, None]).expand_as(order_GTB)
    return torch.zeros_like(is_best_GTB).scatter(-1, order_GTB, is_best_GTB) & free_TB


def share_of_work(reads_GTB: Tensor, rows: Rows) -> float:
    """Blocks that are read, of those that full attention over the same tokens reads."""
    return float(reads_GTB.double().mean(dim=0).sum() / rows.readable_TB.sum())
