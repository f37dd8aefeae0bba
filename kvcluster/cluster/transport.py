"""How tensors move between ranks: Unix sockets on one machine, torch.distributed otherwise.

Each class is a `Ring` (see `attention.ring`). A ring belongs to one epoch: it is closed, never
repaired.
"""

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from kvcluster.attention.ring import Message, Pending
from kvcluster.errors import RankLost

_SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
_NO_DEADLINE_S = 20 * 24 * 3600.0
"""poll(2) counts milliseconds in 32 bits, which end after 24 days."""


class Done:
    """Nothing is on its way."""

    def wait(self) -> None:
        return

    def wait_idle(self) -> None:
        return


class LoneRing:
    """The ring of a group with one rank: there is nobody to talk to."""

    rank = 0
    size = 1

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        assert not sends
        assert not receives
        return Done()

    def close(self) -> None:
        return


class SocketRing:
    """A mesh of Unix sockets between ranks of one machine. Bytes move while a rank waits.

    Nothing is sent before: these ranks share their cores, and waking a neighbour while this rank
    has work left only takes a core from it.
    `close` may be called from another thread and ends a wait with RankLost.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], *, timeout_s: float) -> None:
        self.rank = rank
        self.size = len(peers) + 1
        self.timeout_s = timeout_s
        self._peers = {other: _Peer(other, link) for other, link in peers.items()}
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_waiting = False

    @classmethod
    def connect(cls, rank: int, size: int, directory: Path, *, timeout_s: float) -> "SocketRing":
        """Meet the other ranks in `directory`, which only this user may enter.

        Rank r listens for the ranks above it and calls those below. Raises: RankLost.
        """
        deadline = time.monotonic() + timeout_s
        peers: dict[int, socket.socket] = {}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(directory / f"{rank}.sock"))
            listener.listen(size)
            listener.settimeout(timeout_s)
            for other in range(rank):
                link = _call(directory / f"{other}.sock", deadline)
                link.sendall(bytes([rank]))
                peers[other] = link
            try:
                while len(peers) < size - 1:
                    link, _ = listener.accept()
                    peers[link.recv(1)[0]] = link
            except TimeoutError as late:
                raise RankLost(f"rank {rank}: not all of {size} ranks called in time") from late
        return cls(rank, peers, timeout_s=timeout_s)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        pending = _SocketPending(self)
        for other, tensor in sends:
            if tensor.numel():
                self._peers[other].outgoing.append((_bytes_of(tensor.contiguous()), pending))
                pending.remaining += 1
        for other, tensor in receives:
            if tensor.numel():
                assert tensor.is_contiguous()
                self._peers[other].incoming.append((_bytes_of(tensor), pending))
                pending.remaining += 1
        return pending

    def close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for peer in self._peers.values():
                    peer.shut_down()
                # A thread that waits on the connections still needs their numbers to be theirs.
                if not self._is_waiting:
                    self._drop_links()

    def progress(self, pending: "_SocketPending", timeout_s: float) -> None:
        """Move bytes in both directions until the messages are through. Raises: RankLost."""
        with self._lock:
            if self._is_closed:
                raise RankLost(f"rank {self.rank} has left the ring")
            self._is_waiting = True
        try:
            self._move(pending, timeout_s)
        finally:
            with self._lock:
                self._is_waiting = False
                if self._is_closed:
                    self._drop_links()

    def _move(self, pending: "_SocketPending", timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            for peer in self._peers.values():
                peer.push()
                peer.pull()
            if not pending.remaining:
                return
            poll = select.poll()
            for peer in self._peers.values():
                events = peer.wanted_events()
                if events:
                    poll.register(peer.link, events)
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                raise RankLost(f"rank {self.rank}: {self._missing()} gave no answer in time")

    def _drop_links(self) -> None:
        for peer in self._peers.values():
            peer.link.close()

    def _missing(self) -> str:
        waiting = [str(peer.rank) for peer in self._peers.values() if peer.wanted_events()]
        return f"rank {', '.join(waiting)}"


class _SocketPending:
    def __init__(self, ring: SocketRing) -> None:
        self._ring = ring
        self.remaining = 0

    def wait(self) -> None:
        if self.remaining:
            self._ring.progress(self, self._ring.timeout_s)

    def wait_idle(self) -> None:
        if self.remaining:
            self._ring.progress(self, _NO_DEADLINE_S)


class _Peer:
    """One connection with its queues of unfinished messages."""

    def __init__(self, rank: int, link: socket.socket) -> None:
        self.rank = rank
        self.link = link
        self.outgoing: deque[tuple[memoryview, _SocketPending]] = deque()
        self.incoming: deque[tuple[memoryview, _SocketPending]] = deque()
        link.settimeout(0)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            link.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)

    def wanted_events(self) -> int:
        return (select.POLLOUT if self.outgoing else 0) | (select.POLLIN if self.incoming else 0)

    def push(self) -> None:
        while self.outgoing:
            view, pending = self.outgoing[0]
            try:
                sent = self.link.send(view)
            except BlockingIOError:
                return
            except OSError as error:
                raise RankLost(f"rank {self.rank} closed its connection") from error
            if sent < len(view):
                self.outgoing[0] = (view[sent:], pending)
            else:
                self.outgoing.popleft()
                pending.remaining -= 1

    def pull(self) -> None:
        while self.incoming:
            view, pending = self.incoming[0]
            try:
                received = self.link.recv_into(view)
            except BlockingIOError:
                return
            except OSError as error:
                raise RankLost(f"rank {self.rank} closed its connection") from error
            if received == 0:
                raise RankLost(f"rank {self.rank} closed its connection")
            if received < len(view):
                self.incoming[0] = (view[received:], pending)
            else:
                self.incoming.popleft()
                pending.remaining -= 1

    def shut_down(self) -> None:
        # Not connected: the other side was faster.
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)


class TorchRing:
    """torch.distributed: Gloo for CPU tensors, NCCL for CUDA tensors where there is a GPU."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def connect(
        cls, rank: int, size: int, address: tuple[str, int], *, timeout_s: float, with_gpu: bool
    ) -> "TorchRing":
        """Join the process group whose store rank 0 keeps at `address`."""
        host, port = address
        store = dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it, its stubs do not
            host, port, size, rank == 0, timeout=timedelta(seconds=timeout_s)
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if with_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
        )
        if with_gpu:
            # NCCL wants every rank in its first call, and our first exchange may be between two.
            dist.all_reduce(torch.zeros(1, device="cuda"))
        return cls(rank, size)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        operations = [
            dist.P2POp(dist.isend, tensor.contiguous(), other)
            for other, tensor in sends
            if tensor.numel()
        ] + [dist.P2POp(dist.irecv, tensor, other) for other, tensor in receives if tensor.numel()]
        if not operations:
            return Done()
        return _TorchPending(operations, dist.batch_isend_irecv(operations))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class _TorchPending:
    def __init__(self, operations: Iterable[dist.P2POp], works: list[dist.Work]) -> None:
        # The operations own the tensors that are still being sent.
        self._operations = operations
        self._works = works

    def wait(self) -> None:
        self._wait(None)

    def wait_idle(self) -> None:
        self._wait(timedelta(seconds=_NO_DEADLINE_S))

    def _wait(self, timeout: timedelta | None) -> None:
        try:
            for work in self._works:
                work.wait() if timeout is None else work.wait(timeout)
        except RuntimeError as error:
            raise RankLost("a rank of the process group is gone") from error


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _call(path: Path, deadline: float) -> socket.socket:
    """Connect to a listener that may not be there yet."""
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as absent:
            link.close()
            if time.monotonic() > deadline:
                raise RankLost(f"nobody listens at {path.name}") from absent
            time.sleep(0.01)
        else:
            return link
