"""What every prefill kernel and its twin take and give.

Shape letters: T query tokens, S keys, H query heads, K KV heads, D head dimension, P pages of the
cache, N blocks of a sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
"""Widest head that a tile of the kernels holds."""


class PartialAttention(NamedTuple):
    """Attention over some of the keys, which merges with that over the others."""

    out_THD: Tensor
    """Softmax-weighted values; zero where no key was visible."""
    lse_TH: Tensor
    """Log-sum-exp of the logits, natural log, float32; -inf where no key was visible."""


class Keys(NamedTuple):
    """The keys and values of one sequence, head-major, in one piece or in blocks of a cache."""

    k_PKSD: Tensor
    v_PKSD: Tensor
    num_keys: int
    block_ids_N: Tensor | None = None
    """int32; where the i-th block of the sequence lies: page id // blocks, and there block
    id % blocks. None: the keys are the first ones of the only page."""
    block_tokens: int = 0
    """Keys of a block; a power of two."""

    @classmethod
    def in_line(cls, k_KSD: Tensor, v_KSD: Tensor) -> "Keys":
        """Keys that lie one after another, with any strides but in a head."""
        return cls(k_KSD[None], v_KSD[None], k_KSD.shape[1])

    @property
    def blocks_per_page(self) -> int:
        return int(self.k_PKSD.shape[2]) // self.block_tokens if self.block_tokens else 1


class BlockBound(NamedTuple):
    """A place among the keys that moves with the row, a block at a time: where the block begins
    that is `lag` blocks before the row's own, or the first key."""

    block_tokens: int
    lag: int
    is_before: bool
    """The row sees what lies before the place; else what follows."""

    def places(self, positions_T: Tensor) -> Tensor:
        """Of rows at these positions."""
        return (positions_T // self.block_tokens - self.lag).clamp_min(0) * self.block_tokens


class Causal(NamedTuple):
    """Which keys a row sees: those up to its own one, or the latest `window` of these; of them, all
    or those on one side of `bound`.

    Row t is key `start + t`; from row `split` on, it is key `resume + t - split`, so that both
    pieces of a zigzag sharding are rows of one call. A row may lie before all keys or after them;
    not before them with a bound.
    """

    start: int = 0
    split: int | None = None
    resume: int = 0
    window: int | None = None
    bound: BlockBound | None = None

    def positions(self, num_tokens: int, device: torch.device | None = None) -> Tensor:
        """positions_T of the rows among the keys."""
        rows_T = torch.arange(num_tokens, device=device)
        if self.split is None:
            return rows_T + self.start
        return torch.where(
            rows_T < self.split, rows_T + self.start, rows_T + (self.resume - self.split)
        )


def check_arguments(
    q_THD: Tensor, keys: Keys, scale: float, causal: Causal | None, carry: PartialAttention | None
) -> None:
    """Raises: ValueError when shapes do not fit, with what was expected."""
    num_tokens, num_heads, key_dim = q_THD.shape
    num_kv_heads, value_dim = keys.k_PKSD.shape[1], keys.v_PKSD.shape[3]
    _check_keys(keys)
    if keys.k_PKSD.shape[3] != key_dim:
        raise ValueError(f"prefill: queries of {key_dim} and keys of {keys.k_PKSD.shape[3]}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"prefill: {num_heads} query heads over {num_kv_heads} KV heads")
    if not 0 < max(key_dim, value_dim) <= MAX_HEAD_DIM:
        raise ValueError(f"prefill: want heads up to {MAX_HEAD_DIM}, got {key_dim}, {value_dim}")
    if not scale > 0:
        raise ValueError(f"prefill: want a scale above 0, got {scale}")
    if any(x.stride(-1) != 1 for x in (q_THD, keys.k_PKSD, keys.v_PKSD) if x.numel()):
        raise ValueError("prefill: want the numbers of a head one after another")
    split = causal.split if causal else None
    if causal and split is not None and causal.resume < causal.start + split:
        raise ValueError("prefill: the second piece of rows begins before the first one ends")
    if carry is not None and carry.out_THD.shape != (num_tokens, num_heads, value_dim):
        raise ValueError(f"prefill: carry has shape {tuple(carry.out_THD.shape)}")


def _check_keys(keys: Keys) -> None:
    page_tokens = keys.k_PKSD.shape[2]
    if keys.v_PKSD.shape[:3] != keys.k_PKSD.shape[:3]:
        raise ValueError("prefill: want as many values as keys")
    if keys.block_ids_N is None:
        if keys.num_keys > page_tokens or len(keys.k_PKSD) != 1:
            raise ValueError("prefill: without block ids, keys lie in one page")
    elif keys.block_tokens < 1 or page_tokens % keys.block_tokens:
        raise ValueError(f"prefill: pages of {page_tokens} in blocks of {keys.block_tokens}")
    elif keys.num_keys > keys.block_ids_N.numel() * keys.block_tokens:
        raise ValueError(f"prefill: {keys.num_keys} keys do not fit into the blocks given")
