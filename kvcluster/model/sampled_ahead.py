"""Tokens that a step on a GPU chose by itself: the next step reads them there, while the host is
still waiting for them.

Shape letters: R rows.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_IN_FLIGHT: Final = 4
"""Steps whose tokens are on their way to the host; more than a rank ever has."""


class SampledAhead:
    """The tokens of the latest step, on the device. Mutated by `send`."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        is_pinned = device.type == "cuda"
        self.tokens_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._on_host = [
            torch.zeros(max_rows, dtype=torch.int64, pin_memory=is_pinned)
            for _ in range(_IN_FLIGHT)
        ]
        self._is_asynchronous = is_pinned
        self._num_sent = 0

    def send(self, tokens_R: Tensor) -> Callable[[], list[int]]:
        """Keep the tokens of a step. What is returned waits for them, in any thread, and must be
        called before three more steps were sent."""
        # A model cannot read NO_TOKEN. What comes after it is thrown away.
        torch.clamp(tokens_R, min=0, out=self.tokens_R[: len(tokens_R)])
        on_host_R = self._on_host[self._num_sent % _IN_FLIGHT][: len(tokens_R)]
        self._num_sent += 1
        on_host_R.copy_(tokens_R, non_blocking=True)
        if not self._is_asynchronous:
            return on_host_R.tolist
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> list[int]:
            arrived.synchronize()
            return list(on_host_R.tolist())

        return wait
