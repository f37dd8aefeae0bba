"""What encoding does to attention, measured while a rank still has both forms of a block.

When blocks become encoded, one query at hand, this rank's last row in the step, attends to those
blocks alone: as they were and as they will be read. With o the outputs of all heads, the attention
error of a sequence is

    sqrt(sum |o_encoded - o_exact|^2 / sum |o_exact|^2),

summed over all layers, ranks and blocks that were encoded. The query sees all of the blocks, those
beyond a layer's window too: what counts is the blocks. A rank without a row in a step measures
nothing there; of a cache that is never encoded the error is 0. Where tokens are kept by score,
blocks of survivors are encoded when an epoch ends, those that moved once more: each time counts,
beside what was read until then. What the tokens meant that were dropped is not measured.

The cost is one row of attention and one reading of the new blocks: nothing beside the rows that
filled them. Kernels round weights to 16 bits, so that what they measure is not less than a
thousandth or so.

Shape letters: H query heads, K KV heads, S keys, D head dimension.
"""

import torch
from torch import Tensor

from kvcluster.attention.encoded import EncodedKeys, attend_encoded
from kvcluster.attention.implementation import Implementation
from kvcluster.attention.part import SequencePart
from kvcluster.cache.store import KVStore, Piece
from kvcluster.types import LayerGeometry


class EncodingErrors:
    """The sums of one step on this rank, by part. Reads the store."""

    def __init__(self, store: KVStore, implementation: Implementation) -> None:
        self._store = store
        self._local = implementation
        self._sums: dict[SequencePart, Tensor] = {}

    def sums(self) -> dict[SequencePart, tuple[float, float]]:
        """By part in which blocks were encoded: sum |o_encoded - o_exact|^2, sum |o_exact|^2.
        Waits for the device."""
        return {part: (float(sums[0]), float(sums[1])) for part, sums in self._sums.items()}

    def measure(
        self,
        layer: int,
        part: SequencePart,
        q_1HD: Tensor,
        exact: Piece,
        encoded: EncodedKeys,
        geometry: LayerGeometry,
        *,
        are_survivors: bool = False,
    ) -> None:
        """Add one query over blocks that were just encoded. `exact` has k_KSD and v_KSD of the same
        blocks' tokens. `are_survivors`: they are no blocks of the part's own table."""
        if not len(encoded.ids_B):
            self._add(part, q_1HD.new_zeros(2, dtype=torch.float32))
            return
        before_1HD = self._local.attend(q_1HD, *exact, geometry).out_THD
        rows = None if are_survivors else self._local.rows
        after = None if rows is None else rows.attend_full(layer, part, q_1HD)
        if after is None:
            after = attend_encoded(q_1HD, self._store, layer, encoded, geometry)
        after_1HD = after.out_THD
        error, size = (after_1HD - before_1HD).square().sum(), before_1HD.square().sum()
        self._add(part, torch.stack([error, size]))

    def _add(self, part: SequencePart, sums: Tensor) -> None:
        self._sums[part] = self._sums[part] + sums if part in self._sums else sums
