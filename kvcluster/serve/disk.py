"""The disk tier of one engine, as its settings ask for it."""

import fcntl
import os
import secrets
from pathlib import Path

from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.tier import TierLedger
from kvcluster.config import ClusterConfig
from kvcluster.engine.disk_parts import DiskParts
from kvcluster.engine.spill_plan import SpillRanks
from kvcluster.engine.tenant_keys import TenantKeys
from kvcluster.errors import ConfigError
from kvcluster.tenancy.limits import Partitions
from kvcluster.tenancy.root_key import KEY_BYTES
from kvcluster.tenancy.shares import TenantShare
from kvcluster.types import DEFAULT_TENANT

_LOCAL_UID = "local"


def disk_parts(config: ClusterConfig, ranks: SpillRanks) -> DiskParts | None:
    """None: no folder is set, and contexts end with the engine. Raises: ConfigError."""
    if not config.spill.folder:
        return None
    folder = Path(config.spill.folder)
    tier = LockedDisk(folder)
    local = None if config.tenancy.database else _local_share(folder)
    return DiskParts(
        tier,
        TierLedger([config.spill.capacity_bytes], unit_bytes=[1]),
        TenantKeys(local),
        ranks,
    )


class LockedDisk(SpillDisk):
    """A folder of one engine: another that swept it would take away what is being written."""

    def __init__(self, folder: Path) -> None:
        """Raises: ConfigError."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"spill.folder: {folder} cannot be used: {error.strerror}") from error
        try:
            # Ends with the process, however that ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(f"spill.folder: {folder} is in use by another engine") from error
        super().__init__(folder / "contexts", folder / "index.sqlite")

    def close(self) -> None:
        super().close()
        os.close(self._lock)


def _local_share(folder: Path) -> TenantShare:
    """Of whoever calls where there are no tenants: a data key beside what it seals. It keeps apart
    nobody, and a copy of single files tells nothing."""
    path = folder / "local.key"
    try:
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.touch(mode=0o600)
            with partial.open("wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"spill.folder: {path} cannot be used: {error.strerror}") from error
    return TenantShare(
        tenant=DEFAULT_TENANT, partitions=Partitions(), tenant_uid=_LOCAL_UID, data_keys={1: key}
    )
