"""Overwrites blocks of one rank with zeros, so that nothing can be read of what they held."""

from collections.abc import Sequence

import torch

from kvcluster.cache.encoded_pages import layers_of
from kvcluster.cache.store import KVStore
from kvcluster.types import EXACT, PAGE_BLOCKS


def zero_blocks(store: KVStore, group: int, codec: str, block_ids: Sequence[int]) -> None:
    """Zero blocks of a KV group in all of its layers. `codec`: `EXACT` for exact blocks. Waits for
    the device: they are zero when this returns."""
    ids_B = torch.tensor(block_ids, dtype=torch.long)
    size = store.block_size
    for layer, _ in layers_of(store.spec, group):
        if codec == EXACT:
            for plane in store.planes(layer):
                for block in block_ids:
                    page, place = divmod(block, PAGE_BLOCKS)
                    plane[page, :, place * size : (place + 1) * size] = 0
        else:
            held = store.read_held(layer, codec, ids_B)
            store.write_held(layer, codec, ids_B, [torch.zeros_like(plane) for plane in held])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
