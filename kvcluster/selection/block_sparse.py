"""Selection `block_sparse`: a fixed pattern of blocks (Longformer, arXiv 2004.05150;
BigBird, arXiv 2007.14062; strides as in Sparse Transformers, arXiv 1904.10509).

A query block reads the blocks right before it (`local`), the first ones (`sinks`, which the papers
call global), every `stride`-th one counted back from itself, and some at random. Random blocks come
from a hash of (seed, layer, query block, key block): every rank and every run picks the same.

Shape letters: J query blocks, B blocks, G heads that choose (here always 1).
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from kvcluster.selection.base import KeySummaries, QueryBlocks, pick_best
from kvcluster.selection.need import Need
from kvcluster.types import LayerGeometry

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIXERS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True, kw_only=True)
class BlockSparse:
    """Counts are blocks."""

    name: ClassVar[str] = "block_sparse"
    needs: ClassVar[Need] = Need.NOTHING
    chooses_in_prompt: ClassVar[bool] = True

    local: int = 8
    """The query's own block and those right before it."""
    sinks: int = 1
    stride: int = 0
    """0: no strided blocks."""
    random: int = 0
    """Random blocks, beside the others."""
    seed: int = 0
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.local < 1:
            raise ValueError(
                f"local counts the query's own block: give 1 or more, not {self.local}"
            )
        negative = {
            name: number
            for name, number in (
                ("sinks", self.sinks),
                ("stride", self.stride),
                ("random", self.random),
            )
            if number < 0
        }
        if negative:
            raise ValueError(f"numbers of blocks are 0 or more, not {negative}")

    def covers(self, num_blocks: int) -> bool:
        """See `BlockSelection`."""
        return num_blocks <= self.local

    def num_choosing(self, geometry: LayerGeometry) -> int:  # noqa: ARG002
        """See `BlockSelection`."""
        return 1

    def scores(
        self,
        geometry: LayerGeometry,  # noqa: ARG002
        q_JHD: Tensor,  # noqa: ARG002
        keys: KeySummaries,  # noqa: ARG002
    ) -> Tensor:
        """See `BlockSelection`."""
        raise AssertionError("a fixed pattern compares no blocks")

    def ranking(self, blocks: QueryBlocks, readable_JB: Tensor) -> None:  # noqa: ARG002
        """See `BlockSelection`."""
        return

    def choose(
        self,
        layer: int,
        blocks: QueryBlocks,
        readable_JB: Tensor,
        score_GJB: Tensor,  # noqa: ARG002
    ) -> Tensor:
        """See `BlockSelection`."""
        reads_JB = self._pattern(layer, blocks.own_J, readable_JB.shape[1])
        return (reads_JB & readable_JB)[None]

    def blocks(self, layer: int, query_block: int) -> list[int]:
        """The blocks that a query block reads, ascending, its own included."""
        own_J = torch.tensor([query_block])
        reads_B = self._pattern(layer, own_J, query_block + 1)[0]
        return [int(block) for block in reads_B.nonzero()]

    def _pattern(self, layer: int, own_J: Tensor, num_blocks: int) -> Tensor:
        blocks_B = torch.arange(num_blocks, device=own_J.device)
        back_JB = own_J[:, None] - blocks_B
        is_past_JB = back_JB >= 0
        reads_JB = (back_JB < self.local) | (blocks_B < self.sinks)
        if self.stride:
            reads_JB |= back_JB % self.stride == 0
        reads_JB &= is_past_JB
        if self.random:
            free_JB = is_past_JB & ~reads_JB
            score_JB = _uniform(self.seed, layer, own_J[:, None], blocks_B)
            reads_JB |= pick_best(score_JB[None], free_JB, torch.full_like(own_J, self.random))[0]
        return reads_JB


def _uniform(seed: int, layer: int, own_J1: Tensor, blocks_B: Tensor) -> Tensor:
    """float64 of 53 random bits, a function of the arguments (splitmix64 of each in turn)."""
    state = torch.full_like(own_J1, _signed(seed))
    for counter in (torch.full_like(own_J1, layer), own_J1, blocks_B):
        state = _mixed(state ^ _mixed(counter))
    return _shifted(state, 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    for shift, factor in _MIXERS:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as if x were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
