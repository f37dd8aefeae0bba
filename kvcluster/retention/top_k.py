"""The k best tokens of each KV head, over all ranks, exactly: ties go to the lower position.

Shape letters: K KV heads, S tokens, W values of a byte.
"""

import torch
from torch import Tensor

from kvcluster.retention.ranks import Ranks

PADDING = -1
"""Position where a rank's row has no token: heads keep unequal numbers of tokens on one rank."""

_BYTE_VALUES = 256
_SCORE_SHIFTS = range(56, -8, -8)
_POSITION_SHIFTS = range(32, -8, -8)
"""Positions up to 2^40."""


def top_k_global(scores_KS: Tensor, positions_KS: Tensor, k: int) -> Tensor:
    """kept_KS: True for the `k` tokens of each row with the highest score, float64.

    The definition. No position may occur twice in a row, but `PADDING` may, and is never kept.
    Raises: ValueError if a row has fewer than `k` tokens, or `k` is less than 1.
    """
    is_token_KS = positions_KS != PADDING
    _check_enough(is_token_KS.sum(dim=1), k)
    # Last to first: sorting by the weaker key first, stably, leaves ties of the stronger in order.
    order_KS = positions_KS.argsort(dim=1, stable=True)
    scored_KS = scores_KS.gather(1, order_KS).argsort(dim=1, descending=True, stable=True)
    order_KS = order_KS.gather(1, scored_KS)
    is_padding_KS = ~is_token_KS.gather(1, order_KS)
    order_KS = order_KS.gather(1, is_padding_KS.byte().argsort(dim=1, stable=True))
    return torch.zeros_like(is_token_KS).scatter_(1, order_KS[:, :k], value=True)


def top_k_sharded(scores_KS: Tensor, positions_KS: Tensor, k: int, ranks: Ranks) -> Tensor:
    """This rank's part of `top_k_global` over the tokens of all ranks.

    Finds the threshold byte by byte, of the score and then of the position: 13 sums of 256 counts
    a head, however many tokens there are (radix selection).
    Raises: ValueError if a head has fewer than `k` tokens on all ranks, or `k` is less than 1.
    """
    undecided_KS = positions_KS != PADDING
    _check_enough(ranks.sum(undecided_KS.sum(dim=1)), k)
    kept_KS = torch.zeros_like(undecided_KS)
    wanted_K = torch.full((len(scores_KS),), k, device=scores_KS.device)
    keys = [(_ascending(scores_KS), shift) for shift in _SCORE_SHIFTS]
    # A lower position is the higher key.
    keys += [(~positions_KS, shift) for shift in _POSITION_SHIFTS]
    for key_KS, shift in keys:
        byte_KS = (key_KS >> shift) & (_BYTE_VALUES - 1)
        counts_KW = torch.zeros(
            len(scores_KS), _BYTE_VALUES, dtype=torch.int64, device=scores_KS.device
        ).scatter_add_(1, byte_KS, undecided_KS.long())
        counts_KW = ranks.sum(counts_KW)
        at_least_KW = counts_KW.flip(1).cumsum(dim=1).flip(1)
        # The threshold's byte is the highest one that enough tokens reach.
        pivot_K1 = (at_least_KW >= wanted_K[:, None]).sum(dim=1, keepdim=True) - 1
        kept_KS |= undecided_KS & (byte_KS > pivot_K1)
        wanted_K -= (at_least_KW - counts_KW).gather(1, pivot_K1)[:, 0]
        undecided_KS &= byte_KS == pivot_K1
    return kept_KS | undecided_KS


def _ascending(scores_KS: Tensor) -> Tensor:
    """int64 whose bits, read as unsigned, are in the order of the float64 scores."""
    # Adding zero makes the two zeros one.
    bits_KS = (scores_KS + 0.0).view(torch.int64)
    return torch.where(bits_KS < 0, ~bits_KS, bits_KS ^ torch.iinfo(torch.int64).min)


def _check_enough(num_tokens_K: Tensor, k: int) -> None:
    if k < 1 or bool((num_tokens_K < k).any()):
        raise ValueError(f"cannot choose {k} of {num_tokens_K.tolist()} tokens, one number a head")
