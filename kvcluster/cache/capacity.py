"""How many blocks each KV group gets on a rank. Torch-free: engine and ranks must agree."""

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.types import PAGE_BLOCKS, ModelSpec


def blocks_per_group(spec: ModelSpec, cache: CacheConfig, engine: EngineConfig) -> tuple[int, ...]:
    """Blocks of one rank, one number per window of `spec.windows`.

    A group without a window holds every token: `capacity_tokens`. A windowed group holds, per
    running request, the window and the chunks in flight behind it, and never needs more.
    """
    size = cache.block_size
    full = cache.capacity_tokens // size
    in_flight = (1 + engine.lookahead_steps) * engine.prefill_chunk_tokens
    counts = (
        full
        if window is None
        else min(full, engine.max_running * (-(-(window + in_flight) // size) + 2))
        for window in spec.windows
    )
    # Memory comes in pages.
    return tuple(-(-count // PAGE_BLOCKS) * PAGE_BLOCKS for count in counts)


def block_bytes_per_group(spec: ModelSpec, block_size: int) -> tuple[int, ...]:
    """Bytes of one block of exact K and V, in all layers of each group together."""
    elements = [0] * len(spec.windows)
    for layer in (spec.layers[index] for index in spec.storing_layers):
        elements[spec.group_of(layer)] += layer.kv_elements_per_token
    return tuple(block_size * spec.bytes_per_element * count for count in elements)
