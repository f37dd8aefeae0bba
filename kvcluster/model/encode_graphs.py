"""Blocks that single rows fill become encoded by recorded work (`attention/encode_step.py`).

Asked for one by one, its kernels keep the host of a GPU busy for as long as several tokens take,
and the tokens wait.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from kvcluster.attention.encode_step import EncodeStep, only_full_blocks
from kvcluster.attention.kernel_attention import KernelAttention
from kvcluster.attention.part import SequencePart
from kvcluster.cache.store import KVStore
from kvcluster.model.recorded import Recording, record

_MAX_CODECS: Final = 16
"""Whose work is kept: requests choose their codecs."""


class EncodeGraphs:
    """One rank's cache, which is mutated."""

    def __init__(self, store: KVStore, kernels: KernelAttention, pool: Any) -> None:
        """`pool`: of memory for recordings; None: nothing is recorded."""
        self._store = store
        self._kernels = kernels
        self._pool = pool
        self._steps: dict[str, EncodeStep | None] = {}
        self._recordings: dict[str, Recording[Tensor] | None] = {}

    def serves(self, part: SequencePart) -> bool:
        """Whether the blocks that the part fills are such that `run` encodes them."""
        blocks = only_full_blocks(self._store, part)
        return blocks is not None and self._step(part.codec) is not None

    def run(
        self, part: SequencePart, queries: Mapping[int, Tensor], row: int
    ) -> Callable[[], tuple[float, float]]:
        """Encode, and measure with the part's row of `queries`, q_RHD by layer. What is returned
        waits for the sums, in any thread."""
        step, blocks = self._step(part.codec), only_full_blocks(self._store, part)
        assert step is not None, "asked for what is not served"
        assert blocks is not None, "asked for what is not served"
        step.set_block(blocks, queries, row)
        if self._pool is not None and part.codec not in self._recordings:
            self._recordings[part.codec] = record(step.run, self._pool)
        recording = self._recordings.get(part.codec)
        return _sent(step.run() if recording is None else recording.run())

    def _step(self, codec: str) -> EncodeStep | None:
        if codec not in self._steps:
            while len(self._steps) >= _MAX_CODECS:
                oldest = next(iter(self._steps))
                del self._steps[oldest]
                self._recordings.pop(oldest, None)
            step = EncodeStep(self._store, self._kernels, codec)
            self._steps[codec] = step if step.is_served() else None
        return self._steps[codec]


def _sent(sums_2: Tensor) -> Callable[[], tuple[float, float]]:
    """On their way to the host."""
    is_pinned = sums_2.device.type == "cuda"
    on_host_2 = torch.empty(2, dtype=sums_2.dtype, pin_memory=is_pinned)
    on_host_2.copy_(sums_2, non_blocking=True)
    arrived = None
    if is_pinned:
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

    def wait() -> tuple[float, float]:
        if arrived is not None:
            arrived.synchronize()
        return float(on_host_2[0]), float(on_host_2[1])

    return wait
