"""The collectives that choosing survivors and blocks needs, over the ring of a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcluster.attention.ring import Ring


class RingRanks:
    """`kvcluster.retention.ranks.Ranks` of this rank's ring."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._others = [rank for rank in range(ring.size) if rank != ring.rank]

    def sum(self, x: Tensor) -> Tensor:
        """See `Ranks`. Raises: RankLost."""
        return torch.stack(self._exchange(x, [x.shape] * self._ring.size)).sum(dim=0)

    def gather(self, x: Tensor) -> list[Tensor]:
        """See `Ranks`. Raises: RankLost."""
        own_length = torch.tensor([x.shape[-1]], device=x.device)
        lengths = self._exchange(own_length, [(1,)] * self._ring.size)
        return self._exchange(x, [(*x.shape[:-1], int(length)) for length in lengths])

    def _exchange(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What every rank gives, of these shapes by rank."""
        own = x.contiguous()
        received = {rank: x.new_empty(tuple(shapes[rank])) for rank in self._others}
        self._ring.exchange([(rank, own) for rank in self._others], list(received.items())).wait()
        return [received.get(rank, own) for rank in range(self._ring.size)]
