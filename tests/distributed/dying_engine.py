"""An engine over ranks in threads that writes contexts until it is killed, and tells which are on
disk."""

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

from kvcluster.engine.context_api import ContextRecord
from kvcluster.tenancy.limits import Tier
from kvcluster.types import DEFAULT_TENANT
from tests.distributed.stored_contexts import finished, storing
from tests.distributed.test_contexts import tokens

NUM_TOKENS = 100


def tokens_of(context_id: str) -> list[int]:
    """What is uploaded under a name."""
    return tokens(NUM_TOKENS, int(context_id.removeprefix("c")))


def write_until_killed(folder: Path, told: Connection) -> None:
    asyncio.run(_write(folder, told))


async def _write(folder: Path, told: Connection) -> None:
    """Sends the name of a context once its record names the disk, and again once it is deleted."""
    async with storing(folder, 2) as service:
        for number in range(1, 1000):
            context_id = f"c{number}"
            record: ContextRecord = await finished(
                service, tokens_of(context_id), context_id, durable=True
            )
            assert Tier.DISK in record.tiers
            told.send((context_id, True))
            if number % 3 == 0:
                await service.delete_context(DEFAULT_TENANT, context_id, "")
                told.send((context_id, False))
