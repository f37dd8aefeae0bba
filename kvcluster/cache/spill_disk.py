"""The disk tier: sealed contexts in a folder on a disk, with an index that survives any crash."""

import time
from collections.abc import Callable
from pathlib import Path

from kvcluster.cache.spill_folder import SpillFolder
from kvcluster.cache.spill_index import SpillIndex
from kvcluster.errors import ConfigError


class SpillDisk(SpillFolder):
    """A `SpillTier`. What it has committed is there after a restart."""

    def __init__(
        self, folder: Path, index: Path, *, unix_time: Callable[[], float] = time.time
    ) -> None:
        """Opens both, makes them if they are missing, and sweeps what was not committed.

        Raises: ConfigError, SpillUnavailable.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"spill.folder: {folder} cannot be used: {error.strerror}") from error
        super().__init__(folder, SpillIndex(index), unix_time=unix_time)
