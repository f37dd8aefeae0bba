"""Ranks of one machine: a mesh of Unix sockets moves the tensors, eventfds wake who waits.

Why two means: a socket wakes its reader with a hint that the writer is about to sleep, and the
kernel then puts the reader on the writer's core. A rank that asks two others would be pushed aside
by the first before it could ask the second, and those two would share one core. An eventfd gives
no such hint. So bytes go through sockets that nobody polls for data, and then the bell rings.
"""

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kvcluster.attention.ring import Message, Pending
from kvcluster.errors import RankLost

_SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
_VIEWS_PER_CALL = 64
"""Messages that one system call moves; far below the limit of the kernel (IOV_MAX, 1024)."""
_NO_DEADLINE_S = 20 * 24 * 3600.0
"""poll(2) counts milliseconds in 32 bits, which end after 24 days."""


class SocketRing:
    """A `Ring` of Unix sockets. What fits the socket buffers leaves at once, the rest moves while
    a rank waits; nothing runs in the background.

    A ring belongs to one epoch: it is closed, never repaired. `close` may be called from another
    thread and ends a wait with RankLost.
    """

    def __init__(self, rank: int, bell: int, peers: "Sequence[_Peer]", *, timeout_s: float) -> None:
        """Takes ownership of this rank's bell (an eventfd) and of the connections."""
        self.rank = rank
        self.size = len(peers) + 1
        self.timeout_s = timeout_s
        self._bell = bell
        self._peers = {peer.rank: peer for peer in peers}
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_in_use = False

    @classmethod
    def connect(cls, rank: int, size: int, directory: Path, *, timeout_s: float) -> "SocketRing":
        """Meet the other ranks in `directory`, which only this user may enter.

        Rank r listens for the ranks above it and calls those below. Raises: RankLost.
        """
        deadline = time.monotonic() + timeout_s
        bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        peers: list[_Peer] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(directory / f"{rank}.sock"))
            listener.listen(size)
            listener.settimeout(timeout_s)
            try:
                for other in range(rank):
                    link = _call(directory / f"{other}.sock", deadline)
                    link.settimeout(timeout_s)
                    _introduce(link, rank, bell)
                    peers.append(_Peer(link, *_meet(link)))
                while len(peers) < size - 1:
                    link, _ = listener.accept()
                    link.settimeout(timeout_s)
                    peers.append(_Peer(link, *_meet(link)))
                    _introduce(link, rank, bell)
            except OSError as error:
                os.close(bell)
                for peer in peers:
                    peer.drop()
                raise RankLost(f"rank {rank}: not all of {size} ranks called in time") from error
        return cls(rank, bell, peers, timeout_s=timeout_s)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        pending = _SocketPending(self)
        for other, tensor in sends:
            if tensor.numel():
                self._peers[other].outgoing.append((_bytes_of(tensor.contiguous()), pending))
                pending.remaining += 1
        if pending.remaining:
            with self._in_use():
                self._push()
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
                    peer.hang_up()
                # A thread that waits on the connections still needs their numbers to be theirs.
                if not self._is_in_use:
                    self._drop()

    def progress(self, pending: "_SocketPending", timeout_s: float) -> None:
        """Move bytes in both directions until the messages are through. Raises: RankLost."""
        deadline = time.monotonic() + timeout_s
        with self._in_use():
            while True:
                self._push()
                for peer in self._peers.values():
                    peer.pull()
                if not pending.remaining:
                    return
                self._sleep(deadline)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise RankLost(f"rank {self.rank} has left the ring")
            self._is_in_use = True
        try:
            yield
        finally:
            with self._lock:
                self._is_in_use = False
                if self._is_closed:
                    self._drop()

    def _push(self) -> None:
        # All bells after all bytes: whoever is woken first may take this core.
        for peer in [peer for peer in self._peers.values() if peer.push()]:
            peer.ring_bell()

    def _sleep(self, deadline: float) -> None:
        """Until a bell rings, a full connection has room again, or a peer is gone.

        Returns once after a peer is gone: what it sent before may still complete the messages.
        Raises: RankLost, then and when the deadline passes.
        """
        for peer in self._peers.values():
            if peer.is_gone:
                raise peer.lost()
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        for peer in self._peers.values():
            # Without POLLIN: see the top of this file. A hang-up is reported all the same.
            poll.register(peer.link, select.POLLOUT if peer.outgoing else 0)
        left_s = deadline - time.monotonic()
        events = dict(poll.poll(left_s * 1000)) if left_s > 0 else {}
        if not events:
            raise RankLost(f"rank {self.rank}: {self._missing()} gave no answer in time")
        if self._bell in events:
            os.eventfd_read(self._bell)
        for peer in self._peers.values():
            if events.get(peer.link.fileno(), 0) & (select.POLLHUP | select.POLLERR):
                peer.is_gone = True

    def _drop(self) -> None:
        os.close(self._bell)
        for peer in self._peers.values():
            peer.drop()

    def _missing(self) -> str:
        waiting = [
            str(peer.rank) for peer in self._peers.values() if peer.outgoing or peer.incoming
        ]
        return f"rank {', '.join(waiting)}"


class _SocketPending:
    def __init__(self, ring: SocketRing) -> None:
        self._ring = ring
        self.remaining = 0
        """Messages not yet through."""

    def wait(self) -> None:
        if self.remaining:
            self._ring.progress(self, self._ring.timeout_s)

    def wait_idle(self) -> None:
        if self.remaining:
            self._ring.progress(self, _NO_DEADLINE_S)


Queue = deque[tuple[memoryview, _SocketPending]]


class _Peer:
    """One connection with its queues of unfinished messages."""

    def __init__(self, link: socket.socket, rank: int, bell: int) -> None:
        self.rank = rank
        self.link = link
        self._bell = bell
        self.is_gone = False
        self.outgoing: Queue = deque()
        self.incoming: Queue = deque()
        link.settimeout(0)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            link.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)

    def push(self) -> bool:
        """Send what the connection takes; say whether that was anything."""
        has_moved = False
        while self.outgoing:
            try:
                num_bytes = self.link.sendmsg(_first_views(self.outgoing))
            except BlockingIOError:
                break
            except OSError as error:
                raise self.lost() from error
            has_moved = True
            _advance(self.outgoing, num_bytes)
        return has_moved

    def pull(self) -> None:
        """Receive what is there of the messages that are awaited."""
        while self.incoming:
            try:
                num_bytes = self.link.recvmsg_into(_first_views(self.incoming))[0]
            except BlockingIOError:
                break
            except OSError as error:
                raise self.lost() from error
            if num_bytes == 0:
                raise self.lost()
            _advance(self.incoming, num_bytes)

    def ring_bell(self) -> None:
        os.eventfd_write(self._bell, 1)

    def hang_up(self) -> None:
        # Not connected: the other side was faster.
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        self.link.close()
        os.close(self._bell)

    def lost(self) -> RankLost:
        return RankLost(f"rank {self.rank} closed its connection")


def _first_views(queue: Queue) -> list[memoryview]:
    return [view for view, _ in islice(queue, _VIEWS_PER_CALL)]


def _advance(queue: Queue, num_bytes: int) -> None:
    """Take bytes that have moved off the front of a queue."""
    while num_bytes:
        view, pending = queue.popleft()
        if num_bytes < len(view):
            queue.appendleft((view[num_bytes:], pending))
            return
        num_bytes -= len(view)
        pending.remaining -= 1


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _call(path: Path, deadline: float) -> socket.socket:
    """Connect to a listener that may not be there yet."""
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return link


def _introduce(link: socket.socket, rank: int, bell: int) -> None:
    socket.send_fds(link, [rank.to_bytes(4)], [bell])


def _meet(link: socket.socket) -> tuple[int, int]:
    """The rank at the other end and its bell."""
    name, bells, _, _ = socket.recv_fds(link, 4, 1)
    if not bells:
        raise ConnectionError("the other end has hung up")
    return int.from_bytes(name), bells[0]
