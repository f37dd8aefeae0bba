"""Moments are what a float64 pass over all tokens would give, however they came in."""

import pytest
import torch
from torch import Tensor

from kvcluster.codec.moments import LayerMoments, MomentSums, upper_bound, weighted_sum

NUM_KV_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 4

# Float64 sums of some hundred numbers around 1 in another order.
ROUNDING = {"atol": 1e-10, "rtol": 1e-10}


def text(seed: int, num_tokens: int = 300, *, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(KEY_DIM, KEY_DIM, generator=generator)
    return (
        torch.randn(num_tokens, 4, KEY_DIM, generator=generator) @ mix,
        torch.randn(num_tokens, NUM_KV_HEADS, KEY_DIM, generator=generator) @ mix + mean,
        torch.randn(num_tokens, NUM_KV_HEADS, VALUE_DIM, generator=generator) - mean,
    )


def moments_of(*texts: tuple[Tensor, Tensor, Tensor]) -> LayerMoments:
    sums = MomentSums(NUM_KV_HEADS, KEY_DIM, VALUE_DIM)
    for q_THD, k_TKD, v_TKD in texts:
        sums.add(q_THD, k_TKD, v_TKD)
    return sums.moments()


def tensors_of(moments: LayerMoments) -> list[Tensor]:
    spreads = (moments.keys, moments.values)
    return [moments.query_KDD, *(x for s in spreads for x in (s.mean_F, s.covariance_FF))]


def assert_same(ours: LayerMoments, expected: LayerMoments) -> None:
    assert ours.num_tokens == expected.num_tokens
    for x, y in zip(tensors_of(ours), tensors_of(expected), strict=True):
        torch.testing.assert_close(x, y, **ROUNDING)


def is_at_least(larger: Tensor, smaller: Tensor) -> bool:
    lowest = torch.linalg.eigvalsh(larger - smaller).min()
    return bool(lowest >= -1e-9 * larger.abs().max())


def test_means_and_covariances_are_those_of_all_tokens() -> None:
    q_THD, k_TKD, v_TKD = text(0, mean=7.0)

    moments = moments_of((q_THD, k_TKD, v_TKD))

    for spread, x_TKD in ((moments.keys, k_TKD), (moments.values, v_TKD)):
        x_FT = x_TKD.double().flatten(1).T
        torch.testing.assert_close(spread.mean_F, x_FT.mean(1), **ROUNDING)
        torch.testing.assert_close(spread.covariance_FF, x_FT.cov(correction=0), **ROUNDING)


def test_a_kv_head_is_weighed_by_the_queries_of_its_own_group() -> None:
    q_THD, k_TKD, v_TKD = text(0)

    moments = moments_of((q_THD, k_TKD, v_TKD))

    second = q_THD[:, 2:].double().reshape(-1, KEY_DIM)
    torch.testing.assert_close(moments.query_KDD[1], second.T @ second / 300, **ROUNDING)


def test_pieces_of_a_text_add_up_to_the_text() -> None:
    whole = text(0)
    pieces = [tuple(x[part] for x in whole) for part in (slice(0, 17), slice(17, 300))]

    assert_same(moments_of(*[(q, k, v) for q, k, v in pieces]), moments_of(whole))


def test_sums_that_were_kept_go_on_where_they_stopped() -> None:
    stopped = MomentSums(NUM_KV_HEADS, KEY_DIM, VALUE_DIM)
    stopped.add(*text(0))
    resumed = MomentSums(NUM_KV_HEADS, KEY_DIM, VALUE_DIM)

    resumed.load(stopped.tensors())
    resumed.add(*text(1))

    assert_same(resumed.moments(), moments_of(text(0), text(1)))


def test_kept_sums_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="want query of shape"):
        MomentSums(NUM_KV_HEADS, KEY_DIM, VALUE_DIM).load(
            MomentSums(NUM_KV_HEADS, 3, VALUE_DIM).tensors()
        )


def test_no_tokens_have_no_moments() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        MomentSums(NUM_KV_HEADS, KEY_DIM, VALUE_DIM).moments()


def test_a_weighted_sum_of_texts_is_the_text_mixed_from_them() -> None:
    """Twice the weight is the same as the text given twice."""
    mixed = weighted_sum([moments_of(text(0, mean=3.0)), moments_of(text(1))], [2.0, 1.0])

    expected = moments_of(text(0, mean=3.0), text(0, mean=3.0), text(1))
    for x, y in zip(tensors_of(mixed), tensors_of(expected), strict=True):
        torch.testing.assert_close(x, y, **ROUNDING)


def test_the_upper_bound_is_no_less_than_any_text_in_any_direction() -> None:
    texts = [text(seed, mean=float(seed)) for seed in range(3)]

    bound = upper_bound([moments_of(one) for one in texts], [1.0] * 3)

    for q_THD, k_TKD, _ in texts:
        off_TF = k_TKD.double().flatten(1) - bound.keys.mean_F
        assert is_at_least(bound.keys.covariance_FF, off_TF.T @ off_TF / len(off_TF))
        assert is_at_least(bound.query_KDD, moments_of((q_THD, k_TKD, k_TKD[:, :, :4])).query_KDD)


def test_the_upper_bound_of_one_text_is_that_text() -> None:
    one = moments_of(text(0))

    assert_same(upper_bound([one], [1.0]), one)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0]])
def test_weights_must_be_one_positive_number_for_each_text(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive weight"):
        weighted_sum([moments_of(text(0)), moments_of(text(1))], weights)
