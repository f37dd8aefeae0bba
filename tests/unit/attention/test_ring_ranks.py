"""Collectives over a ring give every rank the same."""

import pytest
import torch
from torch import Tensor

from kvcluster.attention.ring import LoneRing
from kvcluster.attention.ring_ranks import RingRanks
from tests.thread_ring import ThreadRing, run_ranks


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_sum_of_all(size: int) -> None:
    rings = ThreadRing.group(size)

    def body(rank: int) -> Tensor:
        return RingRanks(rings[rank]).sum(torch.tensor([[rank, 2**40]]))

    for total in run_ranks(size, body):
        assert total.tolist() == [[sum(range(size)), size * 2**40]]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_what_all_give_whatever_its_length(size: int) -> None:
    rings = ThreadRing.group(size)

    def body(rank: int) -> list[Tensor]:
        return RingRanks(rings[rank]).gather(torch.full((2, rank), float(rank)))

    for gathered in run_ranks(size, body):
        assert [part.tolist() for part in gathered] == [
            [[float(rank)] * rank] * 2 for rank in range(size)
        ]


def test_a_lone_rank_hears_itself() -> None:
    ranks = RingRanks(LoneRing())
    x = torch.tensor([[1, 2, 3]])

    assert torch.equal(ranks.sum(x), x)
    assert torch.equal(ranks.gather(x)[0], x)
