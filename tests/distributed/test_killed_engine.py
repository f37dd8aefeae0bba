"""Kill -9 of the process that has engine and ranks: a context is whole afterwards, or not there."""

import multiprocessing
import random
from pathlib import Path

import pytest

from kvcluster.engine.context_api import ContextState
from kvcluster.tenancy.limits import Tier
from kvcluster.types import DEFAULT_TENANT
from tests.distributed.dying_engine import tokens_of, write_until_killed
from tests.distributed.stored_contexts import files_in, num_charged, storing
from tests.distributed.test_contexts import QUESTION, generate

NUM_KILLS = 3


@pytest.mark.slow
async def test_after_a_kill_at_any_time_a_context_is_whole_or_not_there(tmp_path: Path) -> None:
    chance = random.Random(5)
    # One process imports torch, the others are its forks.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([write_until_killed.__module__])
    for kill in range(NUM_KILLS):
        folder = tmp_path / str(kill)
        reading, writing = processes.Pipe(duplex=False)
        process = processes.Process(target=write_until_killed, args=(folder, writing))
        process.start()
        writing.close()
        told = [reading.recv() for _ in range(2 + kill)]
        # Somewhere in the next upload, its writing or a deletion.
        process.join(timeout=chance.uniform(0, 0.1))
        process.kill()
        process.join()
        try:
            while True:
                told.append(reading.recv())
        except EOFError:
            reading.close()
        states = dict(told)

        async with storing(folder, 3) as service:
            records = {
                each.context_id: each for each in await service.list_contexts(DEFAULT_TENANT)
            }
            for record in records.values():
                assert (record.state, record.tiers) == (ContextState.ACTIVE, (Tier.DISK,))
            on_disk = sum(file.stat().st_size for file in files_in(folder))
            assert on_disk == num_charged(service)
            # The act after the last that was told may be done or not.
            doubtful = [name for name, is_there in states.items() if is_there != (name in records)]
            assert len(doubtful) <= 1
            assert len(records.keys() - states.keys()) <= 1
            for name in records:
                found, usage = await generate(service, QUESTION, context=name)
                expected, _ = await generate(service, [*tokens_of(name), *QUESTION])
                assert (found, usage.cached_input_tokens) == (expected, 96)
