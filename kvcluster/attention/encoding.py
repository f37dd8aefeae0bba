"""Blocks that no row after a step reads exact go where encoded ones are, once in a step and layer.

That happens as soon as the rows are written, so that rows of the same step which read such blocks
encoded find them where they are. The exact blocks stay as they are until the next step.

Shape letters: T this rank's rows, B blocks, S tokens of a block, H query heads, K KV heads, D head
dimension.
"""

from collections.abc import Sequence

from torch import Tensor

from kvcluster.attention.encoded import EncodedKeys
from kvcluster.attention.encoding_error import EncodingErrors
from kvcluster.attention.part import SequencePart
from kvcluster.cache.store import KVStore, in_blocks, keys_and_values
from kvcluster.codec.array import consecutive
from kvcluster.types import EXACT, ModelSpec


class BlockEncoding:
    """The parts of one step that have a codec, on one rank. Mutates the store."""

    def __init__(
        self, spec: ModelSpec, store: KVStore, rank: int, parts: Sequence[SequencePart]
    ) -> None:
        self._spec = spec
        self._store = store
        self._rank = rank
        self._parts = [part for part in parts if part.codec != EXACT]
        self._errors = EncodingErrors(store)

    def encode_full(self, layer: int, q_THD: Tensor) -> None:
        """Encode the full blocks of a layer whose rows are written, and measure what that does to
        the attention of `q_THD`, this rank's rows."""
        geometry = self._spec.layers[layer]
        for part in self._parts:
            if part.codec_in(geometry.window) != EXACT:
                self._encode(layer, part, q_THD)

    def errors(self) -> dict[SequencePart, tuple[float, float]]:
        """What encoding did to attention in all layers so far: see `EncodingErrors.sums`."""
        return self._errors.sums()

    def _encode(self, layer: int, part: SequencePart, q_THD: Tensor) -> None:
        geometry = self._spec.layers[layer]
        full = part.full_blocks(self._spec.group_of(geometry))
        if full is None:
            return
        exact = self._store.gather(layer, full.runs)
        arrays = [in_blocks(plane, part.block_size) for plane in exact.planes]
        blocks = keys_and_values(arrays, geometry)
        positions_BS = consecutive(full.starts_B, part.block_size)
        self._store.encode(layer, part.codec, full.encoded_ids_B, blocks, positions_BS)
        if part.num_rows[self._rank]:
            last_1HD = q_THD[part.rows][-1:]
            encoded = EncodedKeys(part.codec, full.encoded_ids_B, positions_BS, 0)
            before = keys_and_values(exact.planes, geometry)
            self._errors.measure(layer, part, last_1HD, before, encoded, geometry)
