"""How much of a process's memory is really there, mapping by mapping (Linux, /proc/PID/smaps)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_KIBIBYTE: Final = 1024
# The first line of each mapping: `7f2c4a000000-7f2c5a000000 rw-p 00000000 00:00 0`.
_BEGINNING: Final = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ", re.MULTILINE)
_FIELD: Final = re.compile(r"^(Size|Rss): +(\d+) kB$", re.MULTILINE)


class Mapping(NamedTuple):
    """One range of addresses."""

    size_bytes: int
    resident_bytes: int
    """The part that memory was committed for."""


def parse_smaps(text: str) -> list[Mapping]:
    """The mappings of one process, in the order of their addresses."""
    mappings = []
    for mapping in _BEGINNING.split(text)[1:]:
        fields = {name: int(kibibytes) for name, kibibytes in _FIELD.findall(mapping)}
        if fields.keys() == {"Size", "Rss"}:
            mappings.append(Mapping(fields["Size"] * _KIBIBYTE, fields["Rss"] * _KIBIBYTE))
    return mappings


def processes_with_arena(proc: Path, arena_bytes: int) -> dict[int, int]:
    """By process that has one: resident bytes of its largest mapping, of at least `arena_bytes`.

    Processes that end meanwhile or are not ours are left out. `proc` is /proc.
    """
    found = {}
    for pid, text in _smaps(proc):
        largest = max(parse_smaps(text), default=Mapping(0, 0))
        if largest.size_bytes >= arena_bytes:
            found[pid] = largest.resident_bytes
    return found


def _smaps(proc: Path) -> Iterator[tuple[int, str]]:
    for directory in proc.iterdir():
        if directory.name.isdigit():
            try:
                yield int(directory.name), (directory / "smaps").read_text()
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
