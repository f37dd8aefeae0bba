"""What the fairness benchmark makes of the times that it took."""

from pathlib import Path

import pytest

from kvcluster.bench.fairness import (
    FLOOR_TOKENS,
    LONGEST_TOKENS,
    Flood,
    Held,
    Rounds,
    report_of,
)
from kvcluster.bench.fairness_tenants import BLUE, RED, make_tenants
from kvcluster.tenancy.directory import TenantDirectory
from kvcluster.tenancy.sqlite_store import SqliteTenantStore

IDLE = [0.2] * 99 + [0.4, 0.9]
FLOOD = Flood(num_done=4, seconds=2.0)


def value(name: str, busy: list[float], held: Held) -> tuple[float, bool]:
    found = {each.name: each for each in report_of(Rounds([IDLE], [busy]), FLOOD, held)}
    return found[name].value, found[name].meets_target


@pytest.mark.parametrize(("second_longest", "is_met"), [(0.59, True), (0.61, False)])
def test_the_second_longest_of_a_hundred_waits_decides(second_longest: float, is_met: bool) -> None:
    busy = [0.25] * 99 + [second_longest, 3.0]

    ratio, met = value("p99_beside_flood_over_idle", busy, Held())

    assert (ratio, met) == (pytest.approx(second_longest / 0.4), is_met)


def test_all_rounds_count_together_and_say_how_they_differ() -> None:
    slow = [2 * wait for wait in IDLE]

    report = report_of(Rounds([IDLE, slow], [IDLE, slow]), FLOOD, Held())

    found = {each.name: each.value for each in report}
    assert found["p99_beside_flood_over_idle"] == 1.0
    assert found["idle_p50_slowest_round_over_fastest"] == 2.0
    assert found["short_ones"] == 202


def test_a_flood_that_holds_more_than_floors_leave_misses_the_target() -> None:
    held = Held(red_bytes=[10, 1 << 40, 10])

    assert not value("flood_most_held_of_what_floors_leave", IDLE, held)[1]
    assert value("flood_most_held_of_what_floors_leave", IDLE, Held(red_bytes=[10]))[1]


def test_a_short_one_that_is_refused_misses_the_target() -> None:
    assert not value("short_ones_refused", IDLE, Held(num_refused=1))[1]


def test_what_the_flood_got_is_told_beside() -> None:
    assert value("flood_throughput", IDLE, Held())[0] == 4 * LONGEST_TOKENS / 2.0


def test_its_tenants_have_working_keys_and_one_has_the_floor(tmp_path: Path) -> None:
    database = tmp_path / "tenants.sqlite"
    secrets = make_tenants(database, floor_bytes=FLOOR_TOKENS)
    store = SqliteTenantStore(database)
    directory = TenantDirectory(store)

    red, blue = (directory.credential(secret).tenant for secret in secrets[1:])
    store.close()

    assert (red.tenant, red.partitions.gpu.floor_bytes) == (RED, 0)
    assert (blue.tenant, blue.partitions.gpu.floor_bytes) == (BLUE, FLOOR_TOKENS)
