"""What moves between ranks, and the two routes on which shards of history travel.

The loops below are the algorithm; how bytes move is behind the `Ring` protocol. Both routes visit
every rank's shard once; `Visit` attends to it and merges. The third route, pass-Q, moves queries
instead: see `step.StepAttention`.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from torch import Tensor

from kvcluster.codec.base import EncodedKV

Message = tuple[int, Tensor]
"""The other rank, and what is sent to it or the contiguous buffer that is filled from it."""


class Pending(Protocol):
    """Messages on their way."""

    def wait(self) -> None:
        """Block until all receives are filled and all sends may be reused. Raises: RankLost when
        a rank is gone or the step's deadline passes."""
        ...

    def wait_idle(self) -> None:
        """The same without a deadline: between steps nobody may have anything to say."""
        ...


class Ring(Protocol):
    """This rank's place among the ranks, and how tensors move between them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Post messages. Between two ranks they arrive in the order in which they were posted.

        Both sides post the same shapes and dtypes; tensors without elements are not sent.
        Raises: RankLost.
        """
        ...


class _Nothing:
    def wait(self) -> None:
        return

    def wait_idle(self) -> None:
        return


NOTHING: Final[Pending] = _Nothing()
"""Nothing is on its way."""


class LoneRing:
    """The ring of a group with one rank: there is nobody to talk to."""

    rank = 0
    size = 1

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        assert not sends
        assert not receives
        return NOTHING

    def close(self) -> None:
        return


Visit = Callable[[int, EncodedKV], None]
"""Attend to the shard of a rank."""

Room = Callable[[int], EncodedKV]
"""Buffers for the shard of a rank."""


def pass_kv(own: EncodedKV, room: Room, visit: Visit, ring: Ring) -> None:
    """Every shard travels round the ring; each rank sends size - 1 shards and holds two at most.

    Each step attends to the shard in hand while the next one arrives (Liu et al. 2023, Ring
    Attention, section 3).
    """
    following, previous = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
    held = own
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        is_last = step == ring.size - 1
        arriving = None if is_last else room((source - 1) % ring.size)
        pending = ring.exchange(
            [] if is_last else [(following, plane) for plane in held.planes],
            [] if arriving is None else [(previous, plane) for plane in arriving.planes],
        )
        visit(source, held)
        pending.wait()
        if arriving is not None:
            held = arriving


def gather(own: EncodedKV, room: Room, visit: Visit, ring: Ring) -> None:
    """Every rank gets every shard in one go: the bytes of `pass_kv`, one wait, N shards held."""
    others = [rank for rank in range(ring.size) if rank != ring.rank]
    arriving = {rank: room(rank) for rank in others}
    pending = ring.exchange(
        [(rank, plane) for rank in others for plane in own.planes],
        [(rank, plane) for rank in others for plane in arriving[rank].planes],
    )
    visit(ring.rank, own)
    pending.wait()
    for rank in others:
        visit(rank, arriving[rank])
