"""A folder in the host's memory for one engine: its own, empty, and gone with it.

    /dev/shm/kvcluster-1000.lock               held while folders are made and swept
    /dev/shm/kvcluster-1000-5f0c.../lock       held by the engine that has the folder
    /dev/shm/kvcluster-1000-5f0c.../contexts/

What a killed engine leaves, sealed under keys that went with it, goes when the next one starts.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvcluster.cache.spill_host import SpillHost
from kvcluster.errors import ConfigError

_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mounts")


class HostMemory(SpillHost):
    """A host tier in a folder that it makes."""

    def __init__(self, base: Path, *, capacity_bytes: int) -> None:
        """Sweeps what engines that are gone have left. Raises: ConfigError when `base` is not in
        memory, has less than that, or cannot be used."""
        _check_memory(base, capacity_bytes)
        try:
            with _locked(base / f"kvcluster-{os.getuid()}.lock"):
                for left in base.glob(f"kvcluster-{os.getuid()}-*"):
                    _sweep(left)
                self._home = base / f"kvcluster-{os.getuid()}-{secrets.token_hex(8)}"
                (self._home / "contexts").mkdir(mode=0o700, parents=True)
                self._home.chmod(0o700)
                self._lock = _lock(self._home / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"spill.host_folder: {base} cannot be used: {error.strerror}"
            ) from error
        super().__init__(self._home / "contexts")

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._home, ignore_errors=True)
        os.close(self._lock)


def _check_memory(base: Path, capacity_bytes: int) -> None:
    """Raises: ConfigError."""
    try:
        found = _file_system(base.resolve(strict=True))
        num_bytes = shutil.disk_usage(base).total
    except OSError as error:
        raise ConfigError(f"spill.host_folder: {base} cannot be used: {error.strerror}") from error
    if found not in _MEMORY:
        raise ConfigError(
            f"spill.host_folder: want a folder in memory (tmpfs), got {base} on {found}"
        )
    if num_bytes < capacity_bytes:
        raise ConfigError(
            f"spill.host_capacity_bytes: want at most the {num_bytes} bytes of {base}, got "
            f"{capacity_bytes}: in a container, --shm-size gives more"
        )


def _file_system(path: Path) -> str:
    """Type of the mount that a path is on; the last one of a place hides those before it."""
    mounts = [line.split()[1:3] for line in _MOUNTS.read_text().splitlines()]
    above = [(len(where), kind) for where, kind in mounts if path.is_relative_to(where)]
    longest = max((length for length, _ in above), default=0)
    return [kind for length, kind in above if length == longest][-1] if above else "nothing known"


def _sweep(folder: Path) -> None:
    """Remove the folder of an engine that is gone."""
    with suppress(OSError):
        lock = _lock(folder / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            shutil.rmtree(folder)
        finally:
            os.close(lock)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _lock(path: Path, operation: int) -> int:
    """An open file with a lock, which ends with the process, however that ends. Raises: OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, operation)
    except OSError:
        os.close(file)
        raise
    return file
