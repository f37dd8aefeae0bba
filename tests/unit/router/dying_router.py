"""A router with tenants as a process of its own, to be killed: `dying_router.py DATABASE`. Prints
the address of its admin port."""

import asyncio
import sys

from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.router.front_door import FrontDoor
from tests.unit.router.fake_backend import FakeBackend


async def serve(database: str) -> None:
    door = FrontDoor(
        [FakeBackend()],
        RouterConfig(listen="127.0.0.1:0"),
        TenancyConfig(database=database, admin_listen="127.0.0.1:0"),
    )
    await door.start()
    sys.stdout.write(f"{door.admin_address}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
