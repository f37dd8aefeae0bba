"""CUDA graphs of what a rank does again and again."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Recording(NamedTuple, Generic[Result]):
    """Work that is recorded, and what it gave: overwritten by its next run."""

    graph: "torch.cuda.CUDAGraph"
    result: Result

    def run(self) -> Result:
        """Ask the device to do it once more."""
        self.graph.replay()
        return self.result


def record(call: Callable[[], Result], pool: Any) -> Recording[Result] | None:
    """Work that the device does the same way whenever it is asked, with memory of `pool`; None
    where the host waits for the device in the middle, as some mixtures of experts do. The work is
    done as well: twice, because the runs before compile kernels and let libraries choose theirs.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        never_waits = _never_waits(call)
    torch.cuda.current_stream().wait_stream(stream)
    if not never_waits:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = call()
    return Recording(graph, result)


def _never_waits(call: Callable[[], object]) -> bool:
    """Whether the host asks for all of it without waiting for the GPU. A recording that fails
    leaves torch's allocator in no good state, so that this is found out before."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return True
