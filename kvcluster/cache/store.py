"""The tensors of one rank's cache: one pool per layer, written and read by slot.

The store knows nothing of sequences or owners: `SequenceMap` says which slots to touch.

Shape letters: T tokens written, S tokens read, K KV heads, D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcluster.cache.shard import Slots
from kvcluster.codec.base import Codec, EncodedKV, KVShape
from kvcluster.types import ModelSpec


class KVStore:
    """All pools of one rank. Pools of one KV group have the same number of blocks."""

    def __init__(
        self,
        spec: ModelSpec,
        codec: Codec,
        *,
        blocks_per_group: Sequence[int],
        block_size: int,
        like: Tensor,
    ) -> None:
        self._codec = codec
        self.pools = [
            codec.allocate(KVShape(layer, blocks_per_group[spec.group_of(layer)], block_size), like)
            for layer in spec.layers
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for all pools, whether used or not."""
        return sum(pool.num_bytes for pool in self.pools)

    def write(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Encode tokens into the layer's slots."""
        self._codec.encode(self.pools[layer], slots_T, k_TKD, v_TKD)

    def read(self, layer: int, slots: Slots) -> EncodedKV:
        """The encoded tokens of the slots: a view of the pool where they lie in one run."""
        pool = self.pools[layer]
        if slots.run is not None:
            return pool.slice(slots.run.start, slots.run.stop)
        return pool.take(torch.as_tensor(slots.listed, device=pool.planes[0].device))

    def empty(self, layer: int, num_tokens: int) -> EncodedKV:
        """Room for `num_tokens` encoded tokens of the layer that come from another rank."""
        return EncodedKV(
            tuple(
                plane.new_empty((plane.shape[0], num_tokens, *plane.shape[2:]))
                for plane in self.pools[layer].planes
            )
        )

    def restore(self, encoded: EncodedKV) -> tuple[Tensor, Tensor]:
        """k_KSD and v_KSD of encoded tokens."""
        return self._codec.restore(encoded)
