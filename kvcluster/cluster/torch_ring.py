"""Ranks on several machines or on GPUs: torch.distributed moves the tensors."""

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from kvcluster.attention.ring import NOTHING, Message, Pending
from kvcluster.errors import RankLost

_NO_DEADLINE = timedelta(days=20)


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
            return NOTHING
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
        self._wait(_NO_DEADLINE)

    def _wait(self, timeout: timedelta | None) -> None:
        try:
            for work in self._works:
                work.wait() if timeout is None else work.wait(timeout)
        except RuntimeError as error:
            raise RankLost("a rank of the process group is gone") from error
