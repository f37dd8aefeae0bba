"""Kill -9 of the process that offloads: what it had committed is whole, nothing else is there."""

import multiprocessing
import random
from pathlib import Path

import pytest

from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.spill_parts import read_parts
from tests.unit.cache.dying_spill import offload_until_killed
from tests.unit.cache.test_spill import KEYS, assert_whole

NUM_KILLS = 6


@pytest.mark.slow
def test_what_was_committed_is_whole_and_counted_after_a_kill_at_any_time(tmp_path: Path) -> None:
    chance = random.Random(3)
    folder, index = tmp_path / "spill", tmp_path / "index.sqlite"
    # One process imports torch, the others are its forks.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([offload_until_killed.__module__])
    num_committed = 0
    last: dict[str, str] = {}
    for _ in range(NUM_KILLS):
        reading, writing = processes.Pipe(duplex=False)
        process = processes.Process(target=offload_until_killed, args=(folder, index, writing))
        process.start()
        writing.close()
        told = [reading.recv() for _ in range(chance.randint(1, 12))]
        process.kill()
        process.join()
        try:
            while True:
                told.append(reading.recv())
        except EOFError:
            reading.close()
        num_committed += len(told)
        last |= dict(told)

        tier = SpillDisk(folder, index)
        listed = tier.listed()
        found = {sealed.owner.context: sealed.spill for sealed in listed}
        # The act after the last that was told may be done or not.
        differing = [c for c in last if found.get(c, "deleted") != last[c]]
        assert len(differing) <= 1
        last = {context: found.get(context, "deleted") for context in last} | found
        for sealed in listed:
            assert_whole(read_parts(tier.open(sealed.owner, sealed.spill, KEYS)))
        assert {entry.name for entry in folder.iterdir()} == set(found.values())
        on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert on_disk == sum(sealed.num_bytes for sealed in listed)
        tier.close()
    assert num_committed > 30
