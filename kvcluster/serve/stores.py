"""The tiers off the GPUs of one engine, as its settings ask for them."""

import fcntl
import os
import secrets
from pathlib import Path

from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.tier import TierLedger
from kvcluster.config import ClusterConfig
from kvcluster.engine.spill_plan import SpillRanks
from kvcluster.engine.store_parts import SealedTier, StoreParts
from kvcluster.engine.tenant_keys import TenantKeys
from kvcluster.errors import ConfigError
from kvcluster.serve.host_memory import HostMemory
from kvcluster.tenancy.limits import Partitions
from kvcluster.tenancy.root_key import KEY_BYTES
from kvcluster.tenancy.shares import TenantShare
from kvcluster.types import DEFAULT_TENANT

_LOCAL_UID = "local"


def store_parts(config: ClusterConfig, ranks: SpillRanks) -> StoreParts | None:
    """None: contexts are kept on the GPUs alone. Raises: ConfigError."""
    spill = config.spill
    if not spill.folder and not spill.host_capacity_bytes:
        return None
    host = disk = None
    if spill.folder:
        ledger = TierLedger([spill.capacity_bytes], unit_bytes=[1])
        disk = SealedTier(LockedDisk(Path(spill.folder)), ledger)
    if spill.host_capacity_bytes:
        ledger = TierLedger([spill.host_capacity_bytes], unit_bytes=[1])
        memory = HostMemory(Path(spill.host_folder), capacity_bytes=spill.host_capacity_bytes)
        host = SealedTier(memory, ledger)
    local = None if config.tenancy.database else _local_share(spill.folder)
    return StoreParts(TenantKeys(local), ranks, host=host, disk=disk)


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


def _local_share(folder: str) -> TenantShare:
    """Of whoever calls where there are no tenants: a data key beside what it seals, or where that
    is in memory, a new one. It keeps apart nobody, and a copy of single files tells nothing."""
    key = _kept_key(Path(folder) / "local.key") if folder else secrets.token_bytes(KEY_BYTES)
    return TenantShare(
        tenant=DEFAULT_TENANT, partitions=Partitions(), tenant_uid=_LOCAL_UID, data_keys={1: key}
    )


def _kept_key(path: Path) -> bytes:
    """Raises: ConfigError."""
    try:
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.touch(mode=0o600)
            with partial.open("wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"spill.folder: {path} cannot be used: {error.strerror}") from error
