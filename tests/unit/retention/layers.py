"""A small layer, tokens of it, and several ranks that hold them, as threads."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcluster.retention.base import Heads
from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.top_k import PADDING
from kvcluster.types import LayerGeometry

TIMEOUT_S = 60.0


def geometry(
    num_query_heads: int = 4, num_kv_heads: int = 2, softcap: float | None = None
) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        key_dim=8,
        value_dim=8,
        scale=0.4,
        softcap=softcap,
    )


def random_queries(layer: LayerGeometry, first: int, last: int, seed: int) -> Queries:
    generator = torch.Generator().manual_seed(seed)
    q_THD = torch.randn(last - first, layer.num_query_heads, layer.key_dim, generator=generator)
    return Queries(q_THD, first, layer)


def random_candidates(
    layer: LayerGeometry, num_tokens: int, num: int, seed: int, heads: Heads = Heads.OWN
) -> Candidates:
    """The first block of 4, the last 4 tokens, and others of `num_tokens`, which differ by head
    unless the heads share them."""
    generator = torch.Generator().manual_seed(seed)

    def positions() -> list[int]:
        between = torch.randperm(num_tokens - 8, generator=generator)[: num - 8] + 4
        return sorted([*range(4), *between.tolist(), *range(num_tokens - 4, num_tokens)])

    listed = [positions() for _ in range(layer.num_kv_heads)]
    if heads is Heads.SHARED:
        listed = [listed[0]] * layer.num_kv_heads
    shape = (layer.num_kv_heads, num)
    return Candidates(
        torch.tensor(listed),
        torch.randn(*shape, layer.key_dim, generator=generator),
        torch.randint(0, 1 << 34, shape, generator=generator),
    )


def shards(
    candidates: Candidates, num_ranks: int, seed: int, heads: Heads = Heads.OWN
) -> list[tuple[Candidates, Tensor]]:
    """The candidates dealt out to ranks, unevenly by head unless the heads share them, each with
    its place on its rank."""
    generator = torch.Generator().manual_seed(seed)
    owner_KS = torch.randint(num_ranks, candidates.positions_KS.shape, generator=generator)
    if heads is Heads.SHARED:
        owner_KS = owner_KS[:1].expand_as(owner_KS)
    dealt = []
    for rank in range(num_ranks):
        is_own_KS = owner_KS == rank
        width = int(is_own_KS.sum(dim=1).max())
        # Own tokens first; what follows them in a row is padding.
        place_KS = is_own_KS.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
        is_own_KS = is_own_KS.gather(1, place_KS)
        positions_KS = candidates.positions_KS.gather(1, place_KS)
        k_KSD = candidates.k_KSD.gather(
            1, place_KS[..., None].expand(-1, -1, candidates.k_KSD.shape[2])
        )
        own = Candidates(
            positions_KS.masked_fill(~is_own_KS, PADDING),
            k_KSD,
            candidates.mass_KS.gather(1, place_KS).masked_fill(~is_own_KS, 0),
        )
        dealt.append((own, place_KS))
    return dealt


class ThreadRanks:
    """`Ranks` of one process: each rank is a thread."""

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier) -> None:
        self._rank = rank
        self._slots = slots
        self._barrier = barrier

    @classmethod
    def group(cls, size: int) -> "list[ThreadRanks]":
        barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        slots: list[Tensor | None] = [None] * size
        return [cls(rank, slots, barrier) for rank in range(size)]

    def sum(self, x: Tensor) -> Tensor:
        assert not x.is_floating_point()
        return torch.stack(self.gather(x)).sum(dim=0)

    def gather(self, x: Tensor) -> list[Tensor]:
        self._slots[self._rank] = x
        self._barrier.wait()
        found = list(self._given())
        self._barrier.wait()
        return found

    def _given(self) -> Sequence[Tensor]:
        return [x.clone() for x in self._slots if x is not None]
