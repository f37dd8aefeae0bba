"""Merging partials is exact attention, however the keys are split."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.attention.local import attend_plain
from kvcluster.attention.partial import Partial, merge, merge_sinks
from kvcluster.types import LayerGeometry

LAYER = LayerGeometry(num_query_heads=4, num_kv_heads=2, key_dim=8, value_dim=8, scale=8**-0.5)


def random_qkv(
    num_tokens: int, num_keys: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_tokens, 4, 8, generator=generator),
        torch.randn(2, num_keys, 8, generator=generator),
        torch.randn(2, num_keys, 8, generator=generator),
    )


@given(
    cuts=st.lists(st.integers(0, 23), max_size=5).map(sorted),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
)
def test_any_split_of_the_keys_in_any_order_merges_to_the_whole(
    cuts: list[int], order: "st.random.Random", seed: int
) -> None:
    q_THD, k_KSD, v_KSD = random_qkv(5, 23, seed)
    mask_TS = torch.rand(5, 23, generator=torch.Generator().manual_seed(seed)) < 0.4
    bounds = [0, *cuts, 23]
    spans = list(itertools.pairwise(bounds))
    order.shuffle(spans)

    merged = Partial.empty(5, 4, 8, q_THD)
    for low, high in spans:
        merged = merge(
            merged,
            attend_plain(q_THD, k_KSD[:, low:high], v_KSD[:, low:high], LAYER, mask_TS[:, low:high])
            if high > low
            else Partial.empty(5, 4, 8, q_THD),
        )

    whole = attend_plain(q_THD, k_KSD, v_KSD, LAYER, mask_TS)
    # A handful of float32 roundings of numbers near 1.
    torch.testing.assert_close(merged.out_THD, whole.out_THD, rtol=0, atol=2e-6)
    torch.testing.assert_close(merged.lse_TH, whole.lse_TH, rtol=0, atol=2e-6)


def test_the_empty_partial_is_the_identity() -> None:
    q_THD, k_KSD, v_KSD = random_qkv(3, 7, seed=0)
    partial = attend_plain(q_THD, k_KSD, v_KSD, LAYER)

    merged = merge(partial, Partial.empty(3, 4, 8, q_THD))

    assert torch.equal(merged.out_THD, partial.out_THD)
    assert torch.equal(merged.lse_TH, partial.lse_TH)


def test_a_row_that_nobody_saw_stays_empty_and_is_not_nan() -> None:
    empty = Partial.empty(2, 4, 8, torch.empty(0))

    merged = merge(empty, empty)

    assert torch.equal(merged.out_THD, torch.zeros(2, 4, 8))
    assert torch.equal(merged.lse_TH, torch.full((2, 4), -math.inf))


def test_a_sink_only_adds_to_the_denominator() -> None:
    q_THD, k_KSD, v_KSD = random_qkv(3, 7, seed=1)
    sinks_H = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    partial = attend_plain(q_THD, k_KSD, v_KSD, LAYER)

    with_sinks = merge_sinks(partial, sinks_H)

    share_TH = torch.sigmoid(partial.lse_TH - sinks_H)
    torch.testing.assert_close(with_sinks.out_THD, partial.out_THD * share_TH[..., None])
