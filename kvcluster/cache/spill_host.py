"""The host tier: sealed contexts in a folder whose files are in memory (tmpfs), so that every rank
of the machine reads and writes them as it does those on disk.

The index is in this process alone, and the keys of spills, wrapped by the tenants', in nothing but
it: what a kill leaves in the folder opens with nothing. Files are overwritten with zeros before
they go.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from kvcluster.cache.spill_folder import SpillFolder
from kvcluster.cache.spill_index import IndexedSpill
from kvcluster.types import TenantId

_ZEROS: Final = bytes(1024 * 1024)


class SpillHost(SpillFolder):
    """A `SpillTier` that ends with this process. Whoever makes it sees to it that the folder is
    empty, and in memory."""

    def __init__(self, folder: Path, *, unix_time: Callable[[], float] = time.time) -> None:
        super().__init__(folder, MemoryIndex(), unix_time=unix_time, wipe=zero_file)

    def close(self) -> None:
        """Zeroes and removes everything."""
        for sealed in self.listed():
            self.delete(sealed.owner, sealed.spill)
        super().close()


class MemoryIndex:
    """`SpillRows` that nothing of outlives the process. Usable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, IndexedSpill] = {}
        """By spill, oldest first."""

    def put(self, row: IndexedSpill) -> IndexedSpill | None:
        owner = row.sealed.owner
        with self._lock:
            earlier = next(
                (
                    each
                    for each in self._rows.values()
                    if (each.sealed.owner.tenant, each.sealed.owner.context)
                    == (owner.tenant, owner.context)
                ),
                None,
            )
            if earlier is not None:
                del self._rows[earlier.sealed.spill]
            self._rows[row.sealed.spill] = row
        return earlier

    def remove(self, spill: str) -> None:
        with self._lock:
            self._rows.pop(spill, None)

    def find(self, spill: str) -> IndexedSpill | None:
        with self._lock:
            return self._rows.get(spill)

    def read(self, tenant: TenantId | None = None) -> Sequence[IndexedSpill]:
        with self._lock:
            rows = tuple(self._rows.values())
        return [row for row in rows if tenant in (None, row.sealed.owner.tenant)]

    def close(self) -> None:
        with self._lock:
            self._rows.clear()


def zero_file(file: Path) -> None:
    """Overwrite a file in place, whoever still has it open. Raises: OSError."""
    with file.open("r+b", buffering=0) as raw:
        left = raw.seek(0, 2)
        raw.seek(0)
        while left > 0:
            left -= raw.write(_ZEROS[:left])
