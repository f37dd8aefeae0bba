"""Overwrites blocks of one rank with zeros, so that nothing can be read of what they held."""

from collections.abc import Sequence

import torch

from kvcluster.cache.encoded_pages import layers_of
from kvcluster.cache.store import KVStore
from kvcluster.types import EXACT, PAGE_BLOCKS


@torch.inference_mode()
def zero_blocks(store: KVStore, group: int, codec: str, block_ids: Sequence[int]) -> None:
    """Zero blocks of a KV group in all of its layers. `codec`: `EXACT` for exact blocks. Waits for
    the device: they are zero when this returns."""
    ids_B = torch.tensor(block_ids, dtype=torch.long)
    pages_B, places_B = ids_B // PAGE_BLOCKS, ids_B % PAGE_BLOCKS
    for layer, _ in layers_of(store.spec, group):
        if codec == EXACT:
            for plane in store.planes(layer):
                shape = (*plane.shape[:2], PAGE_BLOCKS, store.block_size, plane.shape[3])
                plane.view(shape)[pages_B, :, places_B] = 0
        else:
            like = store.read_held(layer, codec, ids_B[:1])
            zeros = [plane.new_zeros((len(ids_B), *plane.shape[1:])) for plane in like]
            store.write_held(layer, codec, ids_B, zeros)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
