"""Softmax over keys that come tile by tile, for kernels. Scores are to base 2.

Shape letters: M query rows, N keys of a tile, D head dimension.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
    tile: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    q_positions_M: tl.tensor,
    window: tl.tensor,
    HAS_POSITIONS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tl.tensor:
    """Scores of the tokens in [start, end) of a row that are visible, -inf for others. Its block
    number `tile` begins at `position`."""
    offs_s = tl.arange(0, scores_SM.shape[0])
    tokens_S = tile * scores_SM.shape[0] + offs_s
    inside_S = (tokens_S >= start) & (tokens_S < end)
    scores_SM = tl.where(inside_S[:, None], scores_SM, -float("inf"))
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
def online_columns(
    scores_NM: tl.tensor, boost_N: tl.tensor, max_M: tl.tensor, sum_M: tl.tensor
) -> tuple[tl.tensor, ...]:
    """As `online`, where keys are rows. The maximum is that of score + boost: weights times
    2^boost are then at most 1."""
    new_max_M = tl.maximum(max_M, tl.max(scores_NM + boost_N[:, None], 0))
    shift_M = tl.where(new_max_M == -float("inf"), 0.0, new_max_M)
    weights_NM = tl.math.exp2(scores_NM - shift_M[None, :])
    decay_M = tl.math.exp2(max_M - shift_M)
    return weights_NM, new_max_M, sum_M * decay_M + tl.sum(weights_NM, 0), decay_M


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
    acc_EDM: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    place: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """As `store_split`, of channels in GROUPS groups; what is behind them is not written."""
    mask_M = rows_M < NUM_ROWS
    offs_e = tl.arange(0, acc_EDM.shape[0])
    offs_d = tl.arange(0, acc_EDM.shape[1])
    safe_sum_M = tl.where(sum_M > 0, sum_M, 1.0)
    lse_M = tl.where(sum_M > 0, max_M + tl.math.log2(safe_sum_M), -float("inf"))
    places_M = place.to(tl.int64) + rows_M
    tl.store(lse_ptr + places_M, lse_M, mask=mask_M)
    mask_ED = (offs_e < GROUPS)[:, None] & (offs_d < DIM // GROUPS)[None, :]
    channels_ED = offs_e[:, None] * (DIM // GROUPS) + offs_d[None, :]
    tl.store(
        out_ptr + places_M[None, None, :] * DIM + channels_ED[:, :, None],
        acc_EDM / safe_sum_M[None, None, :],
        mask=mask_M[None, None, :] & mask_ED[:, :, None],
    )
