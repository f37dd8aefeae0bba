"""Everything but Ray as a process whose memory can be searched: `residue_server.py DATABASE`.

Ports, tenants, an engine and two ranks over a tiny model. Freed memory is overwritten, so what is
found is held by something. Prints the addresses of both ports.
"""

import asyncio
import sys

import torch

from kvcluster.config import (
    CacheConfig,
    ClusterConfig,
    EngineConfig,
    RingConfig,
    RouterConfig,
    TenancyConfig,
)
from kvcluster.freed_memory import overwrite_freed_memory
from kvcluster.router.front_door import FrontDoor
from tests.served_model import served_model
from tests.thread_executor import running_engine

CONFIG = ClusterConfig(
    model="tiny",
    cache=CacheConfig(block_size=16, capacity_tokens=2048, exact_recent_tokens=20),
    engine=EngineConfig(prefill_chunk_tokens=64, shard_min_tokens=32, retention_s=3.0),
    ring=RingConfig(num_ranks=2),
)


async def serve(database: str) -> None:
    torch.set_num_threads(1)
    async with running_engine(served_model("llama"), CONFIG) as (service, _):
        door = FrontDoor(
            [service],
            RouterConfig(listen="127.0.0.1:0"),
            TenancyConfig(database=database, admin_listen="127.0.0.1:0"),
        )
        await door.start()
        sys.stdout.write(f"{door.address} {door.admin_address}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    overwrite_freed_memory()
    asyncio.run(serve(sys.argv[1]))
