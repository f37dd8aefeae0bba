"""A ring of threads in one process: tests of several ranks without processes or sockets."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from kvcluster.attention.ring import Message

T = TypeVar("T")
Links = dict[tuple[int, int], "queue.Queue[torch.Tensor]"]

TIMEOUT_S = 60.0
"""A message that does not come means that two ranks disagree on what to exchange."""


class ThreadRing:
    """A `Ring` whose messages are queues between threads. Checks shapes and dtypes."""

    def __init__(self, rank: int, size: int, links: Links) -> None:
        self.rank = rank
        self.size = size
        self._links = links

    @classmethod
    def group(cls, size: int) -> list["ThreadRing"]:
        links: Links = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
        return [cls(rank, size, links) for rank in range(size)]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> "_Pending":
        for other, tensor in sends:
            if tensor.numel():
                self._links[self.rank, other].put(tensor.clone())
        return _Pending(
            [
                (self._links[other, self.rank], tensor)
                for other, tensor in receives
                if tensor.numel()
            ]
        )

    def all_delivered(self) -> bool:
        return all(link.empty() for link in self._links.values())


class _Pending:
    def __init__(self, receives: "list[tuple[queue.Queue[torch.Tensor], torch.Tensor]]") -> None:
        self._receives = receives

    def wait(self) -> None:
        for link, tensor in self._receives:
            arrived = link.get(timeout=TIMEOUT_S)
            assert arrived.shape == tensor.shape
            assert arrived.dtype == tensor.dtype
            tensor.copy_(arrived)
        self._receives = []

    def wait_idle(self) -> None:
        self.wait()


def run_ranks(size: int, body: Callable[[int], T]) -> list[T]:
    """Run `body(rank)` of all ranks at the same time; the first error of any is raised."""
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(body, rank) for rank in range(size)]]
