"""A process that offloads contexts until it is killed, and tells what it has committed."""

from multiprocessing.connection import Connection
from pathlib import Path

from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.spill_parts import write_part
from tests.unit.cache.test_spill import KEYS, PARTS, owner


def offload_until_killed(folder: Path, index: Path, told: Connection) -> None:
    """Sends the context and the spill, or that it is deleted, once that is so."""
    tier = SpillDisk(folder, index)
    for number in range(100_000):
        context = owner(context=f"c{number % 4}")
        ticket = tier.begin(context, KEYS, num_parts=len(PARTS))
        receipts = [write_part(ticket, rank, saved) for rank, saved in enumerate(PARTS)]
        sealed = tier.commit(ticket, receipts, KEYS)
        told.send((context.context, sealed.spill))
        if number % 5 == 4:
            tier.delete(sealed.owner, sealed.spill)
            told.send((context.context, "deleted"))
