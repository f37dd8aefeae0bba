"""Blocks that no row after a step reads exact go where encoded ones are, once in a step and layer.

That happens as soon as the rows are written, so that rows of the same step which read such blocks
encoded find them where they are. Layers that share what is written of a block (`codec/joined.py`)
are encoded when the last of them has its rows: no row of the step reads these blocks encoded. The
exact blocks stay as they are until the next step. Where a block cannot be encoded, its part has
failed (`failures`): what is written of it is read by rows of the part alone.

Shape letters: T this rank's rows, B blocks, S tokens of a block, H query heads, K KV heads, D head
dimension.
"""

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from kvcluster.attention.encoded import EncodedKeys
from kvcluster.attention.encoding_error import EncodingErrors
from kvcluster.attention.failures import RAISED, Raised
from kvcluster.attention.implementation import Implementation
from kvcluster.attention.part import FullBlocks, SequencePart
from kvcluster.cache.store import KVStore, in_blocks, keys_and_values
from kvcluster.codec.array import consecutive
from kvcluster.types import EXACT, ModelSpec

ENCODING: Final = "encoding blocks"


def fills_blocks(part: SequencePart, spec: ModelSpec) -> bool:
    """Whether some block of the part becomes encoded, in any layer."""
    return any(
        part.codec_in(window) != EXACT and part.full_blocks(group) is not None
        for group, window in enumerate(spec.windows)
    )


def full_parts(parts: Sequence[SequencePart], spec: ModelSpec) -> dict[int, SequencePart]:
    """Those of which some block becomes encoded, by their place among them."""
    return {place: part for place, part in enumerate(parts) if fills_blocks(part, spec)}


class BlockEncoding:
    """The parts of one step that have a codec, on one rank. Mutates the store."""

    def __init__(
        self,
        spec: ModelSpec,
        store: KVStore,
        rank: int,
        parts: Sequence[SequencePart],
        implementation: Implementation,
        failures: Raised = RAISED,
    ) -> None:
        self._spec = spec
        self._store = store
        self._local = implementation
        self._rank = rank
        self._parts = [part for part in parts if part.codec != EXACT]
        self._failures = failures
        self._errors = EncodingErrors(store, implementation)
        self._last_rows: dict[tuple[SequencePart, int], Tensor] = {}
        """q_1HD of this rank's last row, by part and layer, until the layer is encoded."""

    def encode_full(self, layer: int, q_THD: Tensor) -> None:
        """Encode the full blocks of a layer whose rows are written, and measure what that does to
        the attention of `q_THD`, this rank's rows."""
        geometry = self._spec.layers[layer]
        for part in self._parts:
            if part.codec_in(geometry.window) == EXACT or self._failures.has(part):
                continue
            full = part.full_blocks(self._spec.group_of(geometry))
            if full is not None:
                with self._failures.contain(part, ENCODING):
                    self._encode_part(layer, part, full, q_THD)

    def errors(self) -> dict[SequencePart, tuple[float, float]]:
        """What encoding did to attention in all layers so far: see `EncodingErrors.sums`."""
        return self._errors.sums()

    def _encode_part(self, layer: int, part: SequencePart, full: FullBlocks, q_THD: Tensor) -> None:
        layers = self._store.joined_layers(layer, part.codec)
        if part.num_rows[self._rank]:
            last_1HD = q_THD[part.rows][-1:]
            # The model may reuse the memory before the last layer has its rows.
            self._last_rows[part, layer] = last_1HD.clone() if len(layers) > 1 else last_1HD
        if layer == layers[-1]:
            self._encode(layers, part, full)

    def _encode(self, layers: tuple[int, ...], part: SequencePart, full: FullBlocks) -> None:
        exact = [self._store.gather(layer, full.runs).planes for layer in layers]
        blocks = [
            keys_and_values(
                [in_blocks(plane, part.block_size) for plane in planes], self._spec.layers[layer]
            )
            for layer, planes in zip(layers, exact, strict=True)
        ]
        positions_BS = consecutive(full.starts_B, part.block_size)
        ids_B = full.encoded_ids_B
        is_alone = len(layers) == 1
        if not (is_alone and self._local.encode(layers[0], part.codec, ids_B, blocks[0])):
            self._store.encode_together(layers, part.codec, ids_B, blocks, positions_BS)
        for layer, planes in zip(layers, exact, strict=True):
            last_1HD = self._last_rows.pop((part, layer), None)
            if last_1HD is not None:
                geometry = self._spec.layers[layer]
                encoded = EncodedKeys(part.codec, full.encoded_ids_B, positions_BS, 0)
                before = keys_and_values(planes, geometry)
                self._errors.measure(layer, part, last_1HD, before, encoded, geometry)
