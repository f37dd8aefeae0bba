"""Log probabilities of tokens that are known already.

Shapes: R rows, V vocabulary, N most likely tokens.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

_TILE_ROWS: Final = 64
"""Rows whose distributions are held at one time."""


class Scores(NamedTuple):
    """Natural logs, of the distributions as the model gave them."""

    logprobs_R: Tensor
    top_ids_RN: Tensor
    """Likeliest first."""
    top_logprobs_RN: Tensor


def score(logits_RV: Tensor, wanted_R: Tensor, num_top: int) -> Scores:
    """How likely each row finds its wanted token, and the `num_top` tokens that it finds likeliest.

    `logits_RV` is float32 and is left unchanged. N is `num_top` or the vocabulary, if that is less.
    """
    tiles = [
        _score(logits_tile, wanted_tile, min(num_top, logits_RV.shape[1]))
        for logits_tile, wanted_tile in zip(
            torch.split(logits_RV, _TILE_ROWS), torch.split(wanted_R, _TILE_ROWS), strict=True
        )
    ]
    return Scores(*(torch.cat(planes) for planes in zip(*tiles, strict=True)))


def _score(logits_RV: Tensor, wanted_R: Tensor, num_top: int) -> Scores:
    logprobs_RV = logits_RV.log_softmax(dim=-1)
    top = logprobs_RV.topk(num_top, dim=-1)
    return Scores(logprobs_RV.gather(1, wanted_R[:, None])[:, 0], top.indices, top.values)
