from pathlib import Path

import pytest

from kvcluster.bench.memory import MEBIBYTE, Growth, measurements
from kvcluster.bench.smaps import Mapping, parse_smaps, processes_with_arena

SMAPS = """\
55d0c8a00000-55d0c8a21000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
KernelPageSize:        4 kB
Rss:                 128 kB
Pss:                 128 kB
Private_Dirty:       128 kB
THPeligible:           0
VmFlags: rd wr mr mw me ac
7f2c4a000000-7f2c5a000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:                2048 kB
Swap:                  0 kB
VmFlags: rd wr mr mw me ac
"""


def test_each_mapping_has_its_size_and_what_is_resident() -> None:
    assert parse_smaps(SMAPS) == [
        Mapping(132 * 1024, 128 * 1024),
        Mapping(256 * MEBIBYTE, 2 * MEBIBYTE),
    ]


@pytest.mark.parametrize(
    "text", ["", "Size: 4 kB\nRss: 4 kB\n", "55d0-55d1 rw-p 0 0 0\nSize: 4 kB"]
)
def test_what_is_no_mapping_is_left_out(text: str) -> None:
    assert parse_smaps(text) == []


def test_processes_are_told_by_the_size_of_their_largest_mapping(tmp_path: Path) -> None:
    for name, text in {
        "17": SMAPS,
        "18": SMAPS[: SMAPS.index("7f2c")],
        "19": "",
        "self": SMAPS,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "smaps").write_text(text)
    (tmp_path / "20").mkdir()

    found = processes_with_arena(tmp_path, 256 * MEBIBYTE)

    assert found == {17: 2 * MEBIBYTE}


def test_memory_that_falls_as_reported_meets_the_target() -> None:
    report = measurements(
        {
            "exact": Growth(90 * MEBIBYTE, 90 * MEBIBYTE, MEBIBYTE),
            "int4": Growth(20 * MEBIBYTE, 18 * MEBIBYTE, MEBIBYTE),
        }
    )
    values = {measurement.name: measurement for measurement in report}

    assert values["resident_exact"].value == 90
    assert values["reported_ratio_int4"].value == 5
    assert values["resident_ratio_int4"].value == 4.5
    assert all(measurement.meets_target for measurement in report)


def test_memory_that_stays_misses_it() -> None:
    """A cache that is only masked is counted as freed, and still there."""
    report = measurements(
        {
            "exact": Growth(90 * MEBIBYTE, 90 * MEBIBYTE, MEBIBYTE),
            "int4": Growth(90 * MEBIBYTE, 18 * MEBIBYTE, MEBIBYTE),
        }
    )

    assert not all(measurement.meets_target for measurement in report)
