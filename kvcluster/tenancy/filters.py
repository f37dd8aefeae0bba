"""Filters of lists: `FIELD=VALUE` conditions with AND between them, a part of AIP-160."""

import re
from collections.abc import Callable, Collection

from kvcluster.errors import InvalidField

MAX_FILTER_CHARS = 1000
_CONDITION = re.compile(
    r"""\s*([a-z_]+(?:\.[A-Za-z0-9_./-]+)?)\s*=\s*("[^"]*"|[^\s"=]+)\s*""", re.ASCII
)

Condition = tuple[str, str]


def conditions_in(text: str, fields: Collection[str]) -> tuple[Condition, ...]:
    """The conditions of a filter on any of `fields`; one that ends with a dot stands for all keys
    of a map. Raises: InvalidField."""
    if not text.strip():
        return ()
    if len(text) > MAX_FILTER_CHARS:
        raise InvalidField("filter", f"want at most {MAX_FILTER_CHARS} characters")
    return tuple(_condition(part, fields) for part in re.split(r"\sAND\s", text))


def matches(conditions: tuple[Condition, ...], value_of: Callable[[str], str | None]) -> bool:
    """Whether every condition holds for what has `value_of` each field."""
    return all(value_of(field) == value for field, value in conditions)


def _condition(text: str, fields: Collection[str]) -> Condition:
    found = _CONDITION.fullmatch(text)
    if found is None or not _is_among(found[1], fields):
        named = ", ".join(f"{field}KEY" if field.endswith(".") else field for field in fields)
        raise InvalidField(
            "filter", f"want FIELD=VALUE, more of them with AND between; the fields are {named}"
        )
    return found[1], found[2].strip('"')


def _is_among(name: str, fields: Collection[str]) -> bool:
    head, dot, _ = name.partition(".")
    return head + dot in fields
