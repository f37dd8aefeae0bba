"""Which of the three history routes moves the fewest bytes. No torch: the engine asks too.

N ranks, T new tokens, P tokens of history, e bytes per stored token (scales included). Per rank,
summed over the layers (after Yang et al. 2024, "Context Parallelism for Scalable Million-Token
Inference", Alg. 1, with stored instead of exact bytes):

- pass-KV and gather receive every shard but their own: P * e * (N - 1) / N;
- pass-Q sends its T / N queries to the N - 1 others and gets as many partials back.
"""

from collections.abc import Sequence

from kvcluster.types import LayerGeometry, Route

GATHER_LIMIT_BYTES = 256 * 1024 * 1024
"""Largest history of one layer that every rank may hold at once. Up to it one attention call over
everything beats a ring of small ones; above it the ring keeps memory at two shards."""


def pass_kv_bytes(
    layer: LayerGeometry, num_history_tokens: int, num_ranks: int, element_bytes: float
) -> float:
    """Bytes that one rank receives per layer when shards travel."""
    stored = num_history_tokens * layer.kv_elements_per_token * element_bytes
    return stored * (num_ranks - 1) / num_ranks


def pass_q_bytes(
    layer: LayerGeometry, num_new_tokens: int, num_ranks: int, element_bytes: float
) -> float:
    """Bytes that one rank sends and receives per layer when queries travel."""
    rows = num_new_tokens * (num_ranks - 1) / num_ranks
    there = rows * layer.num_query_heads * layer.key_dim * element_bytes
    back = rows * layer.num_query_heads * (layer.value_dim + 1) * 4
    return there + back


def choose_route(
    layers: Sequence[LayerGeometry],
    *,
    num_new_tokens: int,
    num_history_tokens: int,
    num_ranks: int,
    element_bytes: float,
    stored_share: float = 1.0,
) -> Route:
    """The cheapest route for a step of `num_new_tokens` over `num_history_tokens`.

    `stored_share`: what history takes as it is stored, of what it would take exact.
    """
    stored_bytes = element_bytes * stored_share
    kv = q = largest = 0.0
    for layer in layers:
        history = num_history_tokens
        if layer.window is not None:
            history = min(history, layer.window)
        kv += pass_kv_bytes(layer, history, num_ranks, stored_bytes)
        q += pass_q_bytes(layer, num_new_tokens, num_ranks, element_bytes)
        largest = max(largest, history * layer.kv_elements_per_token * stored_bytes)
    if q < kv:
        return Route.PASS_Q
    return Route.GATHER if largest <= GATHER_LIMIT_BYTES else Route.PASS_KV
