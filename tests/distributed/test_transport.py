"""Rings deliver what was posted, in order, whatever the sizes, and name the rank that is gone."""

import multiprocessing
import socket
import threading
from pathlib import Path

import pytest
import torch

from kvcluster.attention.ring import LoneRing, Ring
from kvcluster.cluster.control import ControlChannel
from kvcluster.cluster.socket_ring import SocketRing
from kvcluster.cluster.torch_ring import TorchRing
from kvcluster.errors import RankLost
from tests.thread_ring import ThreadRing, run_ranks

SIZES = (0, 1, 1000, 3_000_000)
"""Elements: nothing, one packet, and more than the sockets hold in both directions."""


def message(source: int, target: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(size) + 7 * source + 13 * target).to(dtype)


def exchange_with_everybody(ring: Ring) -> None:
    others = [rank for rank in range(ring.size) if rank != ring.rank]
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        received = {
            (other, size): torch.empty(size, dtype=dtype) for other in others for size in SIZES
        }
        pending = ring.exchange(
            [(other, message(ring.rank, other, size, dtype)) for other in others for size in SIZES],
            [(other, tensor) for (other, _), tensor in received.items()],
        )
        pending.wait()
        for (other, size), tensor in received.items():
            assert torch.equal(tensor, message(other, ring.rank, size, dtype))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sockets_carry_every_message(size: int, tmp_path: Path) -> None:
    rings = run_ranks(size, lambda rank: SocketRing.connect(rank, size, tmp_path, timeout_s=30))
    try:
        run_ranks(size, lambda rank: exchange_with_everybody(rings[rank]))
    finally:
        for ring in rings:
            ring.close()


def _gloo_rank(rank: int, size: int, port: int) -> None:
    ring = TorchRing.connect(rank, size, ("127.0.0.1", port), timeout_s=30, with_gpu=False)
    exchange_with_everybody(ring)
    ring.close()


@pytest.mark.slow
def test_gloo_carries_every_message() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_gloo_rank, args=(rank, 3, port)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0, 0]


def test_a_lone_rank_exchanges_nothing() -> None:
    LoneRing().exchange([], []).wait()

    assert LoneRing.size == 1


def connected_pair(directory: Path, *, timeout_s: float) -> list[SocketRing]:
    return run_ranks(2, lambda rank: SocketRing.connect(rank, 2, directory, timeout_s=timeout_s))


def test_a_rank_that_closes_is_named(tmp_path: Path) -> None:
    ours, theirs = connected_pair(tmp_path, timeout_s=30)
    theirs.close()

    with pytest.raises(RankLost, match="rank 1 closed"):
        ours.exchange([], [(1, torch.empty(4))]).wait()
    ours.close()


def test_what_a_rank_sent_before_it_closed_still_arrives(tmp_path: Path) -> None:
    ours, theirs = connected_pair(tmp_path, timeout_s=30)
    received = torch.empty(4)
    theirs.exchange([(0, torch.ones(4))], []).wait()
    theirs.close()

    ours.exchange([], [(1, received)]).wait()

    assert received.tolist() == [1.0] * 4
    ours.close()


def test_a_wait_ends_when_another_rank_than_the_awaited_one_is_gone(tmp_path: Path) -> None:
    rings = run_ranks(3, lambda rank: SocketRing.connect(rank, 3, tmp_path, timeout_s=30))
    rings[2].close()

    with pytest.raises(RankLost, match="rank 2 closed"):
        rings[0].exchange([], [(1, torch.empty(4))]).wait()
    rings[0].close()
    rings[1].close()


def test_a_rank_that_stays_silent_is_named_when_the_deadline_passes(tmp_path: Path) -> None:
    ours, theirs = connected_pair(tmp_path, timeout_s=0.05)

    with pytest.raises(RankLost, match="rank 1 gave no answer in time"):
        ours.exchange([], [(1, torch.empty(4))]).wait()
    ours.close()
    theirs.close()


def test_closing_a_ring_ends_an_idle_wait(tmp_path: Path) -> None:
    ours, theirs = connected_pair(tmp_path, timeout_s=30)
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            ours.exchange([], [(1, torch.empty(4))]).wait_idle()
        except RankLost as error:
            ended.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    ours.close()
    waiter.join(timeout=30)

    assert len(ended) == 1
    theirs.close()


def test_a_rank_that_never_calls_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="not all of 2 ranks called"):
        SocketRing.connect(0, 2, tmp_path, timeout_s=0.05)


def test_orders_reach_every_rank_and_answers_come_back_in_order_of_rank() -> None:
    rings = ThreadRing.group(3)

    def body(rank: int) -> list[bytes]:
        control = ControlChannel(rings[rank])
        if rank == 0:
            control.broadcast(b"plan")
            return control.collect([1, 2])
        order = control.receive()
        control.reply(order + str(rank).encode())
        return [order]

    assert run_ranks(3, body) == [[b"plan1", b"plan2"], [b"plan"], [b"plan"]]


@pytest.mark.parametrize("size", [0, 1, 2040, 2041, 100_000])
def test_answers_of_any_size_arrive_whole(size: int) -> None:
    rings = ThreadRing.group(2)
    answer = bytes(index % 251 for index in range(size))

    def body(rank: int) -> list[bytes]:
        control = ControlChannel(rings[rank])
        if rank == 0:
            return control.collect([1])
        control.reply(answer)
        return []

    assert run_ranks(2, body)[0] == [answer]
