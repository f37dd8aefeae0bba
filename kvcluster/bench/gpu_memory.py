"""What a machine's GPU says of itself, asked without a CUDA context of our own.

The driver of a benchmark that serves from other processes must not take memory on the GPU.
"""

import shutil
import subprocess
import threading
from types import TracebackType
from typing import Final

_PERIOD_S: Final = 0.5
_TIMEOUT_S: Final = 10.0


def query_gpu(field: str, command: str = "nvidia-smi") -> str | None:
    """A field of the first GPU, as `nvidia-smi --help-query-gpu` names it; None without a GPU."""
    if shutil.which(command) is None:
        return None
    try:
        answer = subprocess.run(
            [command, f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
            text=True,
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return next(iter(answer.stdout.splitlines()), "").strip() or None


class MemoryPeak:
    """The most memory of the first GPU that was in use, by all processes together, while the
    `with` block ran: as twice a second shows it."""

    def __init__(self, command: str = "nvidia-smi") -> None:
        self._command = command
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_mib: float | None = None
        """None: there is no GPU that says so."""

    def __enter__(self) -> "MemoryPeak":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            used = query_gpu("memory.used", self._command)
            if used is None:
                return
            self.peak_mib = max(self.peak_mib or 0.0, float(used))
            if self._ended.wait(_PERIOD_S):
                return
