"""A router with tenants and a root key as a process to be killed. Tells its admin address."""

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.router.front_door import FrontDoor
from tests.unit.router.fake_backend import FakeBackend


def serve(database: Path, root_key: Path, told: Connection) -> None:
    asyncio.run(_serve(database, root_key, told))


async def _serve(database: Path, root_key: Path, told: Connection) -> None:
    door = FrontDoor(
        [FakeBackend()],
        RouterConfig(listen="127.0.0.1:0"),
        TenancyConfig(database=str(database), admin_listen="127.0.0.1:0", root_key=str(root_key)),
    )
    await door.start()
    told.send(door.admin_address)
    await asyncio.Event().wait()
