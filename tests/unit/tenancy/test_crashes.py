"""Kill -9 at any point of an act: it and its audit event are both there, or neither."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.types import TenantId
from tests.unit.tenancy import dying

ROOT = Path(__file__).parents[3]
NUM_KILLS = 12


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.unit.tenancy.dying", *arguments]


@pytest.mark.slow
def test_a_process_that_dies_before_any_statement_of_an_act_leaves_all_of_it_or_nothing(
    path: Path,
) -> None:
    output = subprocess.run(
        command("statements", str(path)), cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    left = [json.loads(line) for line in output.splitlines()]

    for run in left:
        assert run["fault"] == "", run
        assert run["audited"] == run["done"], run
    for name in dying.ACTS:
        runs = [run for run in left if run["act"] == name]
        assert [run["was_killed"] for run in runs] == [True] * (len(runs) - 1) + [False]
        # Begin, revision twice, look-up, audit twice, the act, commit: at least.
        assert len(runs) > 8
        assert runs[0]["done"] == []
        assert runs[-1]["done"] == [name]


@pytest.mark.slow
def test_nothing_that_was_acknowledged_is_lost_when_a_process_is_killed_at_random(
    path: Path,
) -> None:
    chance = random.Random(5)
    acknowledged: list[tuple[str, str]] = []
    for start in range(NUM_KILLS):
        process = subprocess.Popen(
            command("acts", str(path), str(start * 100_000)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(chance.randint(1, 90))]
        process.kill()
        lines += process.stdout.read().splitlines(keepends=True)
        process.wait()
        process.stdout.close()
        # The last line may be in half: what it tells of was not acknowledged.
        acknowledged += [tuple(line.split()) for line in lines if line.endswith("\n")]

    store = SqliteTenantStore(path)
    methods = set()
    number = 0
    while page := store.events_after(None, number, 1000):
        methods |= {event.method for event in page}
        number = page[-1].number
    report = store.check_audit()
    done = {("create", found.tenant) for found in store.tenants_after("", 10**6)}
    done -= {("create", "operators")}
    for _, name in tuple(done):
        done |= {("key", name) for _ in store.keys_after(TenantId(name), "", 1)}
    store.close()

    assert len(acknowledged) >= 600
    assert set(acknowledged) <= done
    assert {f"{kind}-{name}" for kind, name in done} == methods
    assert (report.num_events, report.fault) == (len(methods), "")
