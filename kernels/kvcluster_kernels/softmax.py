"""Softmax over keys that come tile by tile, for kernels. Scores are to base 2.

Shape letters: M query rows, N keys of a tile, D head dimension.
"""

from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def append(items: "Any", item: tl.tensor) -> "Any":
    """The tuple and one more."""
    return items + (item,)  # noqa: RUF005


@triton.jit
def to_base_2(
    products: tl.tensor, scale: tl.tensor, softcap: tl.tensor, HAS_SOFTCAP: tl.constexpr
) -> tl.tensor:
    """Scores of dot products."""
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends.
        doubled = products * (scale / softcap * 2 * LOG2_E)
        scores = softcap * LOG2_E * (1 - 2 / (tl.math.exp2(doubled) + 1))
    else:
        scores = products * (scale * LOG2_E)
    return scores


@triton.jit
def visible_at(
    scores: tl.tensor, distance: tl.tensor, window: tl.tensor, HAS_WINDOW: tl.constexpr
) -> tl.tensor:
    """Scores of keys that are not after their query, nor further back than the window. `distance`
    is the query's position less the key's."""
    keep = distance >= 0
    if HAS_WINDOW:
        keep = keep & (distance < window)
    return tl.where(keep, scores, -float("inf"))


@triton.jit
def visible_columns(
    scores_SM: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    q_positions_M: tl.tensor,
    window: tl.tensor,
    HAS_POSITIONS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tl.tensor:
    """Scores of the tokens in [start, end) of a row that are visible, -inf for others. They are its
    tokens from `first` on, which is at `position`."""
    offs_s = tl.arange(0, scores_SM.shape[0])
    tokens_S = first + offs_s
    mask_S = tl.where((tokens_S >= start) & (tokens_S < end), 0.0, -float("inf"))
    scores_SM = scores_SM + mask_S[:, None]
    if HAS_POSITIONS:
        distance_SM = q_positions_M[None, :] - (position + offs_s)[:, None]
        scores_SM = visible_at(scores_SM, distance_SM, window, HAS_WINDOW)
    return scores_SM


@triton.jit
def online(scores_MN: tl.tensor, max_M: tl.tensor, sum_M: tl.tensor) -> tuple[tl.tensor, ...]:
    """Weights of a tile, the new maximum and sum, and what to multiply earlier sums with."""
    new_max_M = tl.maximum(max_M, tl.max(scores_MN, 1))
    # Where nothing is visible yet, -inf minus -inf would be NaN.
    shift_M = tl.where(new_max_M == -float("inf"), 0.0, new_max_M)
    weights_MN = tl.math.exp2(scores_MN - shift_M[:, None])
    decay_M = tl.math.exp2(max_M - shift_M)
    return weights_MN, new_max_M, sum_M * decay_M + tl.sum(weights_MN, 1), decay_M


@triton.jit
def column_weights(
    scores: tl.tuple, exponent: tl.tensor, headroom: tl.constexpr, max_M: tl.tensor
) -> tuple[tl.tuple, tl.tensor, tl.tensor]:
    """Weights of a tile of several parts [P, M], in float16 times 2^(exponent + headroom), the new
    maximum, that of score + exponent, and what to multiply earlier sums with. No weight is then
    above 2^headroom, and none times a factor of at most 2^-exponent."""
    largest_PM = scores[0]
    for part in tl.static_range(1, len(scores)):
        largest_PM = tl.maximum(largest_PM, scores[part])
    new_max_M = tl.maximum(max_M, tl.max(largest_PM, 0) + exponent)
    shift_M = tl.where(new_max_M == -float("inf"), 0.0, new_max_M)
    lowered_M = shift_M - (exponent + headroom)
    weights = ()
    for part in tl.static_range(len(scores)):
        weights_PM = tl.math.exp2(scores[part] - lowered_M[None, :])
        weights = append(weights, weights_PM.to(tl.float16))
    return weights, new_max_M, tl.math.exp2(max_M - shift_M)


@triton.jit
def column_products(
    scores: tl.tuple, scales: tl.tuple, headroom: tl.constexpr, max_M: tl.tensor, sum_M: tl.tensor
) -> tuple[tl.tuple, tl.tensor, tl.tensor, tl.tensor]:
    """Weights of a tile of several parts [P, M] times a scale of each token, float32 [P]: in
    float16 times 2^headroom, with the new maximum and the new sum of weights, and what to multiply
    earlier sums with. The maximum is that of score + log2(scale), or of score + 0 where scales are
    small."""
    largest_PM = scores[0]
    largest_P = scales[0]
    for part in tl.static_range(1, len(scores)):
        largest_PM = tl.maximum(largest_PM, scores[part])
        largest_P = tl.maximum(largest_P, scales[part])
    exponent = tl.math.ceil(tl.math.log2(tl.maximum(tl.max(largest_P, 0), 1.0)))
    new_max_M = tl.maximum(max_M, tl.max(largest_PM, 0) + exponent)
    shift_M = tl.where(new_max_M == -float("inf"), 0.0, new_max_M)
    lowered_M = shift_M - headroom
    products = ()
    total_PM = tl.zeros_like(largest_PM)
    for part in tl.static_range(len(scores)):
        weights_PM = tl.math.exp2(scores[part] - lowered_M[None, :])
        total_PM += weights_PM
        scaled_PM = weights_PM * scales[part][:, None]
        products = append(products, scaled_PM.to(tl.float16))
    decay_M = tl.math.exp2(max_M - shift_M)
    return products, new_max_M, sum_M * decay_M + tl.sum(total_PM, 0), decay_M


@triton.jit
def store_split(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    acc_MD: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    place: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write a split's partial: `place` is the number of its first row among all splits' rows."""
    mask_M = rows_M < NUM_ROWS
    offs_D = tl.arange(0, BLOCK_D)
    safe_sum_M = tl.where(sum_M > 0, sum_M, 1.0)
    out_MD = acc_MD / safe_sum_M[:, None]
    lse_M = tl.where(sum_M > 0, max_M + tl.math.log2(safe_sum_M), -float("inf"))
    places_M = place.to(tl.int64) + rows_M
    tl.store(lse_ptr + places_M, lse_M, mask=mask_M)
    tl.store(
        out_ptr + places_M[:, None] * DIM + offs_D[None, :],
        out_MD,
        mask=mask_M[:, None] & (offs_D < DIM)[None, :],
    )


@triton.jit
def store_columns(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    acc_DM: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    place: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """As `store_split`, of COUNT channels from the FIRST on; what is behind them is not written."""
    mask_M = rows_M < NUM_ROWS
    offs_d = tl.arange(0, acc_DM.shape[0])
    safe_sum_M = tl.where(sum_M > 0, sum_M, 1.0)
    lse_M = tl.where(sum_M > 0, max_M + tl.math.log2(safe_sum_M), -float("inf"))
    places_M = place.to(tl.int64) + rows_M
    tl.store(lse_ptr + places_M, lse_M, mask=mask_M)
    tl.store(
        out_ptr + places_M[None, :] * DIM + FIRST + offs_d[:, None],
        acc_DM / safe_sum_M[None, :],
        mask=mask_M[None, :] & (offs_d < COUNT)[:, None],
    )
