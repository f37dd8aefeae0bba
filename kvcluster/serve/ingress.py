"""The router as a Ray Serve deployment: its own gRPC server in a replica's event loop."""

import asyncio
import os
import resource
from typing import Any

import msgspec
from ray.serve.handle import DeploymentHandle

from kvcluster import log
from kvcluster.config import ClusterConfig
from kvcluster.errors import ConfigError, ErrorRecord
from kvcluster.freed_memory import overwrite_freed_memory
from kvcluster.garbage import exempt_living
from kvcluster.router.front_door import FrontDoor
from kvcluster.serve.remote import RemoteBackend


class RouterMemory(msgspec.Struct, frozen=True):
    """Memory of the router's process."""

    pid: int
    peak_bytes: int


class Ingress:
    """One listener in front of the engines. Knows no prompt longer than a chunk."""

    def __init__(self, config: ClusterConfig, *engines: "DeploymentHandle[Any]") -> None:
        log.configure(level=config.log.level, as_json=True)
        overwrite_freed_memory()
        backends = [RemoteBackend(engine) for engine in engines]
        self._server = FrontDoor(
            backends, config.router, config.tenancy, tls=config.tls, oidc=config.oidc
        )
        # At once, not when asked: Serve starts a router that died again, and nobody asks then.
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        await self._server.start()
        exempt_living()

    async def startup(self) -> str | ErrorRecord:
        """Wait until it listens. Returns HOST:PORT as bound, or as a value why it cannot be."""
        try:
            await self._starting
            # Whoever is told the address finds the health of now, not of a second ago.
            await self._server.publish_health()
        except ConfigError as error:
            return error.to_record()
        return self._server.address

    async def admin_address(self) -> str:
        """HOST:PORT of the admin port as bound; empty: there is none. After `startup`."""
        return self._server.admin_address

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; those that run have `grace_s` to end."""
        await self._server.stop(grace_s=grace_s)

    async def memory(self) -> RouterMemory:
        """For `kvcluster bench upload`."""
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return RouterMemory(pid=os.getpid(), peak_bytes=peak_kib * 1024)
