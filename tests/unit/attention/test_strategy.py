"""The route follows the bytes: shards travel when history is short, queries when it is long."""

import pytest

from kvcluster.attention.strategy import choose_route, pass_kv_bytes, pass_q_bytes
from kvcluster.types import LayerGeometry, Route

LLAMA_8B = LayerGeometry(
    num_query_heads=32, num_kv_heads=8, key_dim=128, value_dim=128, scale=128**-0.5
)


def route(num_new_tokens: int, num_history_tokens: int, stored_share: float = 1.0) -> Route:
    return choose_route(
        [LLAMA_8B] * 4,
        num_new_tokens=num_new_tokens,
        num_history_tokens=num_history_tokens,
        num_ranks=4,
        element_bytes=2.0,
        stored_share=stored_share,
    )


def test_a_short_history_is_gathered() -> None:
    assert route(8192, 4096) is Route.GATHER


def test_a_long_history_stays_and_the_queries_travel() -> None:
    assert route(512, 1_000_000) is Route.PASS_Q


def test_a_long_history_under_a_large_chunk_travels_round_the_ring() -> None:
    assert route(400_000, 400_000) is Route.PASS_KV


def test_packed_blocks_move_the_crossover_towards_travelling_shards() -> None:
    assert route(16_384, 100_000) is Route.PASS_Q
    assert route(16_384, 100_000, stored_share=0.25) is not Route.PASS_Q


def test_only_the_window_of_a_windowed_layer_counts() -> None:
    windowed = LayerGeometry(
        num_query_heads=32, num_kv_heads=8, key_dim=128, value_dim=128, scale=0.1, window=1024
    )

    chosen = choose_route(
        [windowed], num_new_tokens=4096, num_history_tokens=10**6, num_ranks=4, element_bytes=2
    )

    assert chosen is Route.GATHER


def test_bytes_are_those_of_the_published_formulas() -> None:
    assert pass_kv_bytes(LLAMA_8B, 1000, 4, 2) == pytest.approx(2 * 1000 * 8 * 128 * 2 * 3 / 4)
    assert pass_q_bytes(LLAMA_8B, 1000, 4, 2) == pytest.approx(
        750 * 32 * 128 * 2 + 750 * 32 * 129 * 4
    )
