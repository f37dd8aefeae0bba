"""A part of a step whose policy keeps tokens by score and selects among them.

To its rows, blocks are those of the survivors' lists and then, as if they went on, those of the
open epoch. Heads keep tokens of their own, so a block of the lists is another one for each head: it
is compared and picked like any other, by what is known of each head's keys. Those keys are known as
they are read, since nothing else is left of them when an epoch ends; what is known of a block
changes when its tokens do.

Shape letters: S tokens of some blocks, B blocks, K KV heads.
"""

import numpy as np
import torch
from torch import Tensor

from kvcluster.attention.selected_part import RankBlocks, SelectedPart, Selecting
from kvcluster.attention.survivors import SurvivorPart
from kvcluster.retention.base import Heads
from kvcluster.types import EXACT


class SelectedSurvivors(SelectedPart):
    """One step's part of such a sequence."""

    def __init__(
        self,
        survivors: SurvivorPart,
        selecting: Selecting,
        num_prompt_tokens: int,
        device: torch.device,
    ) -> None:
        self._survivors = survivors
        self._lists = survivors.survivors.table
        self._num_kept = survivors.num_before
        super().__init__(survivors.part, survivors.part.table, selecting, num_prompt_tokens, device)

    def own_blocks(self, group: int) -> RankBlocks:
        """See `SelectedPart`."""
        rank, size = self.part.rank, self._size
        blocks_B = self.blocks_here
        kept = self._lists.block_ids(rank, group, 0, self._num_kept)
        epoch = [self._table.block_ids(rank, group, *span) for span in self._spans]
        encoded_ids_B = torch.full_like(blocks_B, -1)
        encoded = self._lists.encoded_ids(rank, group, size, self._num_encoded_below * size)
        is_encoded_B = (blocks_B > 0) & (blocks_B < self._num_encoded_below)
        encoded_ids_B[is_encoded_B] = torch.from_numpy(encoded).to(blocks_B.device)
        exact_ids_B = torch.from_numpy(np.concatenate((kept, *epoch))).to(blocks_B.device)
        return RankBlocks(blocks_B, exact_ids_B, encoded_ids_B)

    def held_tokens(self, blocks_B: Tensor) -> Tensor | None:
        """See `SelectedPart`. The last block of the lists may be short."""
        num_last = self._num_kept % self._size
        is_short_B = blocks_B == self._num_kept // self._size
        if not num_last or not bool(is_short_B.any()):
            return None
        places_S = torch.arange(len(blocks_B) * self._size, device=blocks_B.device)
        is_held_S = ~is_short_B[places_S // self._size] | (places_S % self._size < num_last)
        return is_held_S.nonzero()[:, 0]

    def encoded_positions(self, layer: int, blocks_B: Tensor) -> Tensor:
        """See `SelectedPart`. Where heads share their tokens, these have one position."""
        kept = self._survivors.survivors
        if kept.method.heads is not Heads.SHARED:
            return super().encoded_positions(layer, blocks_B)
        positions_J = kept.marks[layer].positions_KJ[0].long()
        places_B = torch.searchsorted(self.blocks_here, blocks_B)
        offsets_S = torch.arange(self._size, device=blocks_B.device)
        return positions_J[places_B[:, None] * self._size + offsets_S]

    @property
    def _num_encoded_below(self) -> int:
        """Blocks of the lists before this one are encoded, all but the first."""
        return 0 if self.part.codec == EXACT else self._num_kept // self._size

    def _is_exact(self, blocks_B: Tensor, own: int) -> Tensor:  # noqa: ARG002
        return (blocks_B == 0) | (blocks_B >= self._num_encoded_below)

    def _blocks(self, rank: int) -> Tensor:
        starts = self._lists.block_starts(rank, 0, self._num_kept)
        return torch.cat((self._tensor([starts]) // self._size, super()._blocks(rank)))

    def _index_shift(self) -> int:
        return -(-self._num_kept // self._size) - self._survivors.epoch_start // self._size

    def _readable_spans(self) -> list[tuple[int, int]]:
        return [(self._survivors.epoch_start, self.part.end)]
